"""Budgets: how many of the ranked key blocks are chosen, and between whom they are shared; whatever ranked them.

``row``: every query block gets as many. ``head``: the best pairs of blocks of a head, wherever they are, so that one
threshold holds for all its rows; ``layer``: those of all heads of a layer. A threshold given as a number holds for all
heads, layers and steps. Every row has at least one block; forced blocks count.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dit_attn.kernels import BlockLayout, plan_scores
from dit_attn.kernels.layouts.block_lists import top_k_blocks
from dit_attn.kernels.selection.budget import blocks_of_density
from dit_attn.processors.methods.head_budget import HeadBudget
from dit_attn.processors.methods.selectors.base import NEG_INF, Ranking

SPREADS = ("row", "head", "layer")


@dataclass(frozen=True)
class BlockBudget:
    """How many key blocks are chosen.

    Attributes:
        density: fraction of the key blocks, of all heads or of each.
        top_p: instead, softmax mass of every row to reach; at least ``density`` where both are given.
        threshold: score above which a block is chosen besides, in any row.
        spread: of :data:`SPREADS`.
    """

    density: HeadBudget | None = None
    top_p: HeadBudget | None = None
    threshold: float | None = None
    spread: str = "row"

    def choose(self, ranking: Ranking, forced: torch.Tensor | None, sizes: tuple[int, int, int, int]) -> BlockLayout:
        """Return the chosen blocks.

        Args:
            ranking: of (B, H, nq, nk) blocks.
            forced: (B|1, H|1, nq|1, nk) bool, blocks that are chosen in any case.
            sizes: query and key tokens, tokens per query and key block.
        """
        q_len, kv_len, q_block, kv_block = sizes
        if self.threshold is None and (self.spread == "row" or self.density is None):
            k_min = 1 if self.density is None else blocks_of_density(self.density, ranking.scores.shape[-1])
            return plan_scores(
                ranking.scores, density=self.density if self.top_p is None else None, top_p=self.top_p, k_min=k_min,
                forced=forced, q_len=q_len, kv_len=kv_len, q_block=q_block, kv_block=kv_block,
            ).layout  # fmt: skip
        scores = ranking.comparable
        fixed = best_of_row(scores)
        if forced is not None:
            fixed = fixed | (forced & (scores > NEG_INF))
        chosen = fixed
        if self.density is not None:
            chosen = chosen | self._best(scores, fixed)
        if self.threshold is not None:
            chosen = chosen | (scores > self.threshold)
        return BlockLayout.from_mask(chosen, *sizes)

    def next_best(
        self, share: float, ranking: Ranking, chosen: BlockLayout, sizes: tuple[int, int, int, int]
    ) -> BlockLayout:
        """Return the best blocks of those that are not chosen.

        Args:
            share: how many, as a fraction of all key blocks; shared as the budget is.
            ranking, sizes: as for :meth:`choose`.
            chosen: the chosen blocks.
        """
        rest = ranking._replace(scores=ranking.scores.masked_fill(chosen.block_mask(), NEG_INF))
        return BlockBudget(share, spread=self.spread).choose(rest, None, sizes)

    def _best(self, scores: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
        """(B, H, nq, nk) bool, as many blocks as the density says, of every row, head or layer."""
        assert self.density is not None
        _, heads, nq, nk = scores.shape
        each = blocks_of_density(self.density, nk)
        counts = [each] * heads if isinstance(each, int) else list(each)
        if self.spread == "layer":
            return _top(scores.flatten(1)[:, None, None], nq * sum(counts), fixed).reshape(scores.shape)
        together = 1 if self.spread == "row" else nq
        count = torch.tensor(counts, device=scores.device)[None, :, None] * together
        flat = scores if self.spread == "row" else scores.flatten(2)[:, :, None]
        return _top(flat, int(counts[0]) * together if len(set(counts)) == 1 else count, fixed).reshape(scores.shape)


def best_of_row(scores: torch.Tensor) -> torch.Tensor:
    """(B, H, nq, nk) bool, the best block of every row; none in a row without a key."""
    best = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, scores.argmax(-1, keepdim=True), True)
    return best & (scores > NEG_INF)


def _top(scores: torch.Tensor, count: int | torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
    """Bool of scores (B, H|1, rows, n): the ``count`` best of every row, ``fixed`` ones first."""
    width = scores.shape[-1]
    chosen, _ = top_k_blocks(scores, count, fixed.view_as(scores))
    found = scores.new_zeros(*scores.shape[:-1], width + 1, dtype=torch.bool)
    return found.scatter_(-1, chosen, True)[..., :width]
