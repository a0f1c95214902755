"""What a selector sees of an attention call, and what it returns."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch

from dit_attn.kernels.layouts.block_layout import BlockLayout, ceil_div
from dit_attn.kernels.selection.pooling import block_counts
from dit_attn.processors.core.token_permute import PermutedTokens
from dit_attn.processors.methods.pooled_scores import heads_apart

NEG_INF = float("-inf")


@dataclass(frozen=True)
class SelectorInput:
    """One call, in the order in which its blocks are cut.

    Attributes:
        rows: q (B, Sv, H, D), k and v (B, S, Hk, D), visual tokens first.
        q_block, kv_block: tokens per block.
        scale: softmax scale.
        probe: tokens per mean; ``None`` for the rule's own.
        pooled: tokens per pooled key that stands for a skipped block in the softmax; ``None`` where skipped keys are
            dropped.
    """

    rows: PermutedTokens
    q_block: int
    kv_block: int
    scale: float
    probe: int | None = None
    pooled: int | None = None

    @property
    def grid(self) -> tuple[int, int]:
        """Query blocks and key blocks (nq, nk)."""
        return ceil_div(self.rows.q.shape[1], self.q_block), ceil_div(self.rows.k.shape[1], self.kv_block)

    @property
    def visual_blocks(self) -> int:
        """Key blocks that hold nothing but visual tokens; they come first."""
        visual, seq_len = self.rows.order.visual, self.rows.k.shape[1]
        return self.grid[1] if visual == seq_len else visual // self.kv_block

    def has_keys(self) -> torch.Tensor:
        """(B|1, 1, 1, nk) bool, key blocks in which a key exists."""
        return block_counts(self.rows.k, self.kv_block, self.rows.key_mask)[:, :, None] > 0

    def key_logit_bias(self) -> torch.Tensor | None:
        """(B|1, H|1, 1, S) what the model's mask adds to the logits, ``None`` without a mask."""
        rows = self.rows
        if rows.key_bias is not None:
            return rows.key_bias[:, :, None]
        if rows.key_mask is None:
            return None
        return torch.zeros_like(rows.key_mask, dtype=torch.float32).masked_fill(~rows.key_mask, NEG_INF)[:, None, None]

    def heads_apart(self, q_tokens: int, k_tokens: int) -> Iterator[SelectorInput]:
        """The same call a few heads at a time, so that scores of so many tokens per mean stay small."""
        return (replace(self, rows=part) for part in heads_apart(self.rows, q_tokens, k_tokens))


class Ranking(NamedTuple):
    """The ranks of the key blocks.

    Attributes:
        scores: (B, H, nq, nk) fp32, larger is better; natural logarithms but for ``sol``; ``-inf`` where no key exists.
        level: (B, H, nq, 1), to be subtracted before the scores of different rows are compared; ``None`` for 0.
    """

    scores: torch.Tensor
    level: torch.Tensor | None = None

    @property
    def comparable(self) -> torch.Tensor:
        """(B, H, nq, nk) scores that mean the same in every row of every head and layer."""
        return self.scores if self.level is None else self.scores - self.level.nan_to_num(neginf=0.0)


class Selection(NamedTuple):
    """The chosen key blocks of every query block.

    Attributes:
        layout: blocks that are computed.
        fine: skipped blocks, the best of them, that finer pooled keys stand for; ``None`` for none.
    """

    layout: BlockLayout
    fine: BlockLayout | None = None


class Selector:
    """A rule that ranks key blocks.

    Class attributes:
        name: value of the setting ``selector``.
        takes_probe: whether it can look at means of fewer tokens than a block.
    """

    name: ClassVar[str]
    takes_probe: ClassVar[bool] = True

    def rank(self, call: SelectorInput) -> Ranking:
        """Return the ranks of the key blocks of a call."""
        raise NotImplementedError

    def forced(self, call: SelectorInput) -> torch.Tensor | None:
        """Return (1, 1, nq, nk) bool, blocks that the rule takes in any case, inside the budget; ``None`` for none."""
        return None

    def own_probe(self, q_block: int, kv_block: int) -> int | None:
        """Return the tokens per mean where the setting ``probe`` is not given; ``None`` for whole blocks."""
        return None

    def cost(self, probe: int | None) -> float:
        """Return what ranking computes, as a fraction of dense attention; products of whole blocks count as nothing.

        Args:
            probe: tokens per mean; ``None`` for whole blocks.
        """
        return 0.0


def common_divisor(q_block: int, kv_block: int, most: int) -> int:
    """Return the largest divisor of both block sizes that is at most ``most``."""
    both = math.gcd(q_block, kv_block)
    return next(size for size in range(min(most, both), 0, -1) if both % size == 0)


def sum_of_chunks(x: torch.Tensor, q_parts: int, k_parts: int) -> torch.Tensor:
    """Add up (..., m, n) over ``q_parts`` x ``k_parts`` neighbors; the last block may have fewer."""
    missing = (-x.shape[-1] % k_parts, -x.shape[-2] % q_parts)
    x = torch.nn.functional.pad(x, (0, missing[0], 0, missing[1]))
    return x.unflatten(-1, (-1, k_parts)).sum(-1).unflatten(-2, (-1, q_parts)).sum(-2)


def log_of(x: torch.Tensor, exists: torch.Tensor) -> torch.Tensor:
    """Logarithm of scores (B, H, nq, nk) that are not negative, finite at 0, and ``-inf`` where ``exists`` is false."""
    return x.clamp(min=torch.finfo(x.dtype).tiny).log().masked_fill(~exists, NEG_INF)
