"""Measured masks: at refresh steps the exact attention of a layer also says what every block contributes.

The ranks are then no estimate: the softmax mass of every pair of blocks, or the error that leaving it out (or letting
pooled keys stand for it) would make. The mask is kept for a period of steps, while pooled keys are computed anew at
every step, so that the compensation follows the content. DFSAttn (arXiv 2605.23445) and HASTE (arXiv 2605.14513) keep
masks too, those of an estimate, and drop the skipped keys. From HASTE is the early refresh, where the means of queries
and keys have turned away from those of the refresh.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from dit_attn.kernels import pool_blocks
from dit_attn.kernels.block_stats import BlockStats, attention_with_block_stats
from dit_attn.kernels.layouts.block_layout import ceil_div
from dit_attn.processors.core.later_numbers import LaterNumbers
from dit_attn.processors.methods.head_budget import HeadBudget
from dit_attn.processors.methods.selectors.base import Ranking, Selection, SelectorInput, log_of


@dataclass
class MeasuredMask:
    """What a refresh stores for the steps after it.

    Attributes:
        step: step of the refresh.
        density: budget that the mask was chosen for.
        selection: the mask.
        means: block means of queries and keys at the refresh; ``None`` where drift is not watched.
        drift: drift seen at the last step, ``None`` before there was one.
    """

    step: int
    density: HeadBudget | None
    selection: Selection
    means: tuple[torch.Tensor, torch.Tensor] | None = None
    drift: LaterNumbers | None = field(default=None)

    def watch(self, call: SelectorInput) -> None:
        """Measure how far queries and keys have turned since the refresh: 1 less the mean cosine of the block means.

        The larger of the two. It is read at the next step.
        """
        if self.means is None:
            return
        cosines = [
            torch.cosine_similarity(now.float(), then.float(), -1).mean()
            for now, then in zip(block_means_of(call), self.means)
        ]
        self.drift = LaterNumbers(1.0 - torch.minimum(*cosines))


def block_means_of(call: SelectorInput) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, H, nq, D) and (B, Hk, nk, D), block means of queries and keys, in the model's dtype."""
    rows = call.rows
    q, k = pool_blocks(rows.q, call.q_block), pool_blocks(rows.k, call.kv_block, rows.key_mask)
    return q.to(rows.q.dtype), k.to(rows.k.dtype)


def measure(call: SelectorInput, statistic: str) -> BlockStats:
    """Compute exact attention with the statistic of every pair of blocks."""
    rows = call.rows
    return attention_with_block_stats(
        rows.q, rows.k, rows.v, q_block=call.q_block, kv_block=call.kv_block, statistic=statistic,
        pooled=call.pooled, scale=call.scale, key_mask=rows.key_mask, key_bias=rows.key_bias,
    )  # fmt: skip


def ranking_of(call: SelectorInput, stats: BlockStats, statistic: str) -> Ranking:
    """Return the ranks that measured statistics give; rows compare as they are."""
    found = stats.blocks.float()
    return Ranking(log_of(found if statistic == "mass" else found.sqrt(), call.has_keys()))


def mask_bytes(
    tokens: int,
    heads: int,
    head_dim: int,
    element: int,
    blocks: tuple[int, int],
    widest: tuple[int, ...],
    drift: bool,
) -> int:
    """Return the bytes that a layer's mask takes for one sample, at most.

    Args:
        tokens: visual tokens.
        heads, head_dim: of the layer.
        element: bytes of an activation.
        blocks: tokens per query and key block.
        widest: entries of the longest row of each of its lists.
        drift: whether block means are stored.
    """
    nq, nk = (ceil_div(tokens, block) for block in blocks)
    lists = 4 * heads * nq * sum(entries + 1 for entries in widest)
    return lists + (heads * (nq + nk) * head_dim * element if drift else 0)
