"""Rectified SpaAttn (arXiv 2511.19835): block-sparse attention that compensates for the keys it skips.

A sparse softmax is wrong in two ways: the selected keys get too much weight, because the skipped ones are missing from
the denominator, and the contribution of the skipped ones is missing from the sum. The compensations:

* ``paper`` and ``repo``: pooled queries and keys give a block-wise estimate A of the attention matrix, with a column
  for every text token and every video block weighted by its tokens (IPAR). The rows are scaled by the selected mass R,
  and the pooled values of skipped blocks are added with their mass. A gate (GAPR) leaves out blocks whose pooled
  product is smaller than its own first-order error; their mass is dropped (``paper``: rows sum to less than 1) or added
  to R (``repo``, as in the authors' code).
* ``merge``: skipped blocks enter the same softmax as pooled keys, the means of a few keys with ``ln n`` added to the
  logit. There is one denominator and no rescaling, and every row of a block weights them by itself. The best of the
  skipped blocks may have finer pooled keys (``fine``), and all a first-order (PISA, arXiv 2602.01077) and a
  second-order term.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from dit_attn.errors import DitAttnError
from dit_attn.kernels import BlockLayout, Epilogue, pool_blocks, pooled_compensation
from dit_attn.kernels.device import full_precision
from dit_attn.kernels.selection.pooling import pool_stats
from dit_attn.kernels.selection.select import block_probabilities
from dit_attn.kernels.terms import key_value_covariance
from dit_attn.kernels.two_level import FineLevel
from dit_attn.processors.core.call import AttentionCall, Request
from dit_attn.processors.core.token_permute import PermutedTokens
from dit_attn.processors.core.tokens import Tokens
from dit_attn.processors.methods.base import Grid, setting
from dit_attn.processors.methods.head_budget import is_full, mean_budget
from dit_attn.processors.methods.pooled_scores import ordered_scores, per_query_head
from dit_attn.processors.methods.selecting import SELECTORS, SelectingMethod
from dit_attn.processors.methods.selectors.base import Ranking, Selection
from dit_attn.processors.methods.selectors.budgets import BlockBudget
from dit_attn.processors.methods.visual_order import ORDERS, check_tile, visual_order

COMPENSATIONS = ("none", "paper", "repo", "merge")
OVERHEAD = 1.2
"""Time of a call over that of block-sparse attention with as many blocks; the largest in the CPU record of a Wan step
(benchmarks/steps/wan2.1-1.3b_cpu.json) is 1.16."""


@dataclass(frozen=True, kw_only=True)
class RectifiedSpaAttn(SelectingMethod):
    """Attend to the best key blocks along a space-filling curve and compensate for the others.

    Attributes:
        density: fraction of the key blocks each query block attends to, in (0, 1]: a number, or one for each head;
            forced blocks count inside it. 1 is bit-equal to stock attention.
        top_p: attend to further blocks until this pooled softmax mass is reached, a number or one for each head;
            ``None`` for density alone.
        selector: rule that ranks the blocks, see the base class; by default the ``error`` of skipping them, the pooled
            mass times the distance of the block's mean value to the row's output (``top_p`` is a fraction of it then).
        order: order of the visual tokens: ``hilbert`` curve, ``tiles`` (boxes), ``none`` (row-major), or ``auto``:
            ``tiles`` where a box of ``kv_block`` tokens divides the grid, else ``hilbert``.
        tile: (t, h, w) tokens of a box of ``tiles``; ``None`` for the most compact one that divides the grid, or where
            there is none the default of 128 tokens.
        keep: blocks that are always attended to, besides text: ``diagonal``, ``neighbors`` (every block that touches),
            ``first-frame`` (every block with a token of it).
        budget: whether forced blocks count inside ``density`` or are added to it (``extra``, as in the paper's code).
        compensation: ``merge``, ``paper``, ``repo`` or ``none``.
        pooled_block: tokens per pooled key of ``merge``; divides ``kv_block``. ``None`` for ``kv_block`` itself up to
            48 tokens, else its largest divisor up to 32.
        variance: add half the variance of the logits behind a pooled key to its logit (second order; unproven).
        first_order: add the term of PISA (arXiv 2602.01077) to the output: the weight of all pooled keys times the
            query's product with the mean covariance of keys and values.
        fine: share of the key blocks, the best of the skipped ones, that enter ``merge`` as finer pooled keys, in (0,
            1]; ``None`` for none.
        fine_block: tokens per finer pooled key; divides ``kv_block``. ``None`` for a quarter of those of the others.
        gate: whether ``paper`` and ``repo`` leave out blocks whose pooled product is smaller than its error (GAPR).

    Raises:
        DitAttnError: a value out of range, or a ``pooled_block`` that does not divide ``kv_block``.
    """

    slug: ClassVar[str] = "rectified-spaattn"

    density: float | tuple[float, ...] = setting(
        0.25, "fraction of key blocks attended to, of all heads or of each", low=1e-6, high=1.0
    )
    top_p: float | tuple[float, ...] | None = setting(
        None, "also attend to blocks up to this pooled softmax mass, of all heads or of each", low=1e-6, high=1.0
    )
    selector: str = setting("error", "rule that ranks the key blocks", choices=SELECTORS)
    order: str = setting("auto", "order of the visual tokens", choices=ORDERS)
    tile: tuple[int, ...] | None = setting(None, "tokens (t, h, w) of a box of the order `tiles`")
    keep: tuple[str, ...] = setting(
        ("diagonal",), "blocks that are always attended to", choices=("diagonal", "neighbors", "first-frame")
    )
    budget: str = setting("inside", "forced blocks count inside density or are added", choices=("inside", "extra"))
    compensation: str = setting("merge", "compensation for skipped blocks", choices=COMPENSATIONS)
    pooled_block: int | None = setting(None, "tokens per pooled key of merge", low=1)
    variance: bool = setting(False, "second-order term of merge")
    first_order: bool = setting(False, "first-order term of merge (PISA's)")
    fine: float | None = setting(None, "skipped key blocks with finer pooled keys in merge", low=1e-6, high=1.0)
    fine_block: int | None = setting(None, "tokens per finer pooled key", low=1)
    gate: bool = setting(True, "leave out blocks whose pooled product is smaller than its error (paper, repo)")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_tile(self.slug, self.tile)
        if self.pooled_block is not None and self.kv_block % self.pooled_block:
            raise DitAttnError(
                f"{self.slug}.pooled_block must divide kv_block {self.kv_block}, got {self.pooled_block}"
            )
        if self.fine_block is not None and self.kv_block % self.fine_block:
            raise DitAttnError(f"{self.slug}.fine_block must divide kv_block {self.kv_block}, got {self.fine_block}")
        given = [name for name in ("fine", "first_order") if getattr(self, name)]
        if given and self.compensation != "merge":
            raise DitAttnError(
                f"{self.slug}.{given[0]} belongs to compensation merge, not {self.compensation}; leave one of them out"
            )

    @property
    def is_dense(self) -> bool:
        """Whether the settings are dense attention."""
        return is_full(self.density) or is_full(self.top_p)

    @property
    def stand_in_cost(self) -> float:
        """The pooled keys of ``merge``, with their second-order term; that of first order depends on the sequence."""
        if self.tokens_per_stand_in is None:
            return 0.0
        pooled = (1.5 if self.variance else 1.0) / self.tokens_per_stand_in
        return pooled + self.fine_share / self.tokens_per_fine_key

    @property
    def fine_share(self) -> float:
        """``fine``, 0 where it is not set."""
        return self.fine or 0.0

    @property
    def tokens_per_fine_key(self) -> int:
        """Tokens per finer pooled key."""
        if self.fine_block is not None:
            return self.fine_block
        most = max(1, self.tokens_per_pooled_key // 4)
        return next(size for size in range(most, 0, -1) if self.kv_block % size == 0)

    @property
    def tokens_per_stand_in(self) -> int | None:
        """Tokens per pooled key of ``merge``, ``None`` with another compensation."""
        return self.tokens_per_pooled_key if self.compensation == "merge" else None

    def relative_time(self, ratio: Callable[[float], float], grid: Grid) -> float | None:
        """Return what a call costs with its token order and pooled keys; arguments as in the base class.

        Blocks that are added to the density (``extra``) are counted as if every one had all of its neighbors.
        """
        if self.sparse_share is None:
            return None
        around = 3 ** sum(size > 1 for size in grid) if "neighbors" in self.keep else 3
        added = around * self.kv_block / math.prod(grid) if self.budget == "extra" and self.keep else 0.0
        sparse = min(1.0, self.sparse_share + added * (1.0 - mean_budget(self.density)))
        return self.over_period(OVERHEAD * ratio(sparse))

    @property
    def tokens_per_pooled_key(self) -> int:
        """Tokens per pooled key."""
        if self.pooled_block is not None:
            return self.pooled_block
        if self.kv_block <= 48:
            return self.kv_block
        return next(size for size in range(32, 0, -1) if self.kv_block % size == 0)

    def plan(self, call: AttentionCall, request: Request) -> None:
        """Select the blocks of the visual rows, and set the compensation for the others."""
        assert call.tokens is not None
        if self.compensation in ("paper", "repo") and request.bias(call.visual) is not None:
            request.decline(f"compensation {self.compensation!r} does not know the logit bias of another method")
            return
        request.permuted = rows = self.rows_of(call, request)
        with torch.no_grad():
            chosen = self.select(rows, call, request)
        request.layout = chosen.layout
        if self.compensation == "merge":
            self._merge(rows, chosen, request)
        elif self.compensation != "none":
            with torch.no_grad():
                scores = ordered_scores(rows, self.q_block, self.kv_block, call.softmax_scale)
                request.epilogue = self._rectified(scores, chosen.layout, rows)

    def _merge(self, rows: PermutedTokens, chosen: Selection, request: Request) -> None:
        """Let pooled keys stand for the skipped blocks."""
        size, visual = self.tokens_per_pooled_key, rows.order.visual
        pooled = pooled_compensation(rows.k, rows.v, size, key_mask=rows.key_mask, variance=self.variance)
        if self.first_order:
            mask = None if rows.key_mask is None else rows.key_mask[:, :visual]
            slope = key_value_covariance(rows.k[:, :visual], rows.v[:, :visual], size, key_mask=mask)
            pooled = replace(pooled, first_order=slope)
        request.compensation = pooled
        if chosen.fine is not None:
            finer = pooled_compensation(rows.k, rows.v, self.tokens_per_fine_key, key_mask=rows.key_mask)
            request.fine = FineLevel(chosen.fine, finer)

    def rows_of(self, call: AttentionCall, request: Request) -> PermutedTokens:
        """Return the tensors in the order of the method."""
        assert call.tokens is not None
        return request.permute(call, *self.token_order(call.tokens))

    def token_order(self, tokens: Tokens) -> tuple[str, tuple[int, int, int] | None]:
        """Return the name of the token order for a sequence, and the box of ``tiles``."""
        return visual_order(tokens, self.order, self.tile, self.kv_block)

    def forced_of(self, rows: PermutedTokens) -> torch.Tensor | None:
        """Return the blocks of ``keep``, and those with text; ``None`` where they are added to the budget."""
        return None if self.budget == "extra" else self._kept(rows)

    def complete(self, layout: BlockLayout, ranking: Ranking, rows: PermutedTokens) -> Selection:
        """Return the selection with the blocks that are added to the budget, and those with finer pooled keys."""
        if self.budget == "extra":
            mask = layout.block_mask() | (self._kept(rows) & (ranking.scores > float("-inf")))
            layout = BlockLayout.from_mask(mask, *self.sizes_of(rows))
        if self.fine is None:
            return Selection(layout)
        budget = BlockBudget(spread=self.spread)
        return Selection(layout, budget.next_best(self.fine, ranking, layout, self.sizes_of(rows)))

    def _kept(self, rows: PermutedTokens) -> torch.Tensor:
        return rows.order.forced(self.keep, rows.k.shape[1], self.q_block, self.kv_block)

    def _rectified(self, scores: torch.Tensor, layout: BlockLayout, rows: PermutedTokens) -> Epilogue:
        """Row scale R (B, H, nq) and addition c (B, H, nq, D) of the paper."""
        mass = block_probabilities(scores)
        selected = layout.block_mask()
        skipped = ~selected & (scores > float("-inf"))
        added = skipped & self._beneficial(rows) if self.gate else skipped
        added_mass = torch.where(added, mass, 0.0)
        scale = torch.where(selected, mass, 0.0).sum(-1) if self.compensation == "paper" else 1.0 - added_mass.sum(-1)
        scale = torch.where(skipped.any(-1), scale, 1.0)  # nothing to compensate for: exact, whatever the sum rounds to
        values = per_query_head(pool_blocks(rows.v, self.kv_block, rows.key_mask), rows)
        with full_precision(added_mass.device):
            return Epilogue(row_scale=scale, add=added_mass @ values)

    def _beneficial(self, rows: PermutedTokens) -> torch.Tensor:
        """(B, H, nq, nk) bool, the gate: ``|q.k| > |dq.k| + |q.dk|`` of block means and mean absolute deviations."""
        q, dq = pool_stats(rows.q, self.q_block)
        k, dk = (per_query_head(x, rows) for x in pool_stats(rows.k, self.kv_block, rows.key_mask))
        with full_precision(q.device):
            gain = (q @ k.transpose(-1, -2)).abs()
            return gain > (dq @ k.transpose(-1, -2)).abs() + (q @ dk.transpose(-1, -2)).abs()
