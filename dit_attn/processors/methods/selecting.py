"""Base of the methods that choose key blocks by a score: which selector ranks, and how the budget is shared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from dit_attn.errors import DitAttnError
from dit_attn.kernels import BlockLayout
from dit_attn.kernels.selection.budget import blocks_of_density
from dit_attn.processors.core.call import AttentionCall, Request
from dit_attn.processors.core.token_permute import PermutedTokens
from dit_attn.processors.methods.base import Grid, Phase, setting
from dit_attn.processors.methods.error_control import plan_controlled
from dit_attn.processors.methods.head_budget import HeadBudget, budget_of_call, mean_budget
from dit_attn.processors.methods.refresh import RefreshSchedule
from dit_attn.processors.methods.selectors import RULES
from dit_attn.processors.methods.selectors.base import Ranking, Selection, SelectorInput
from dit_attn.processors.methods.selectors.budgets import SPREADS, BlockBudget
from dit_attn.processors.methods.selectors.measured import (
    MeasuredMask,
    block_means_of,
    mask_bytes,
    measure,
    ranking_of,
)
from dit_attn.processors.methods.sparse import SparseMethod

MEASURED = "measured"
SELECTORS = ("mass", "error", "sol", "sub-block", "ear", "ear-centered", "dfs", "pisa", "measured")


@dataclass(frozen=True, kw_only=True)
class SelectingMethod(SparseMethod):
    """Base of a method that ranks key blocks and attends to the best of them.

    Attributes:
        selector: rule that ranks the blocks: pooled ``mass`` or ``error``, ``sol`` (Sol-Attn), ``sub-block``
            (SubBlock), ``ear`` and ``ear-centered`` (SVG-EAR's probe), ``dfs`` (DFSAttn), ``pisa`` (PISA's
            log-variance), or ``measured`` by the exact attention of a refresh step.
        probe: tokens per mean that the rule looks at; ``None`` for the rule's own.
        spread: who shares the budget: every ``row`` (query block) has as many blocks, or one threshold holds for all
            rows of a ``head`` or of a ``layer``.
        threshold: score above which blocks are chosen besides, in all heads, layers and steps: the natural logarithm of
            their share of mass or error, of ``sol`` its tau.
        measure: what ``measured`` ranks by: the softmax ``mass`` of a block, or the ``error`` of skipping it.
        period: steps from one refresh of ``measured`` to the next.
        stagger: whether the layers refresh at different steps of the period.
        drift: refresh a layer where one less the mean cosine of its block means to those of the last refresh is above
            this; it is known a step later. ``None`` watches nothing.
        target_error: bound of the relative L2 error of a layer's output, by which every layer has its own density at
            every step, from ``density`` up to dense attention. It is measured on sampled rows every few steps and
            holds for the steps after that, 0 for dense attention. ``None`` measures nothing.

    Raises:
        DitAttnError: a value out of range, a ``probe`` that does not fit, ``top_p`` with a spread, or another setting
            that decides the density besides ``target_error``.
    """

    selector: str = setting("mass", "rule that ranks the key blocks", choices=SELECTORS)
    probe: int | None = setting(None, "tokens per mean that blocks are ranked by", low=1)
    spread: str = setting("row", "who shares the budget of blocks", choices=SPREADS)
    threshold: float | None = setting(None, "score above which blocks are also attended to, everywhere")
    measure: str = setting("error", "what `measured` ranks by", choices=("mass", "error"))
    period: int = setting(10, "steps between refreshes of `measured`", low=2)
    stagger: bool = setting(True, "refresh the layers of `measured` at different steps")
    drift: float | None = setting(None, "turn of queries or keys that refreshes early", low=0.0, high=2.0)
    target_error: float | None = setting(
        None, "error of a layer's output that decides its density, `density` or more", low=0.0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top_mass is not None and (self.spread != "row" or self.threshold is not None):
            raise DitAttnError(
                f"{self.slug}.top_p sets the number of blocks of every row; leave out spread and threshold"
            )
        if self.target_error is not None:
            self._check_control()
        if self.probe is None:
            return
        if self.selector not in RULES or not RULES[self.selector].takes_probe:
            raise DitAttnError(f"{self.slug}.probe is {self.probe}, but selector {self.selector} looks at whole blocks")
        blocks = {"q_block": self.q_block} | ({} if self.selector.startswith("ear") else {"kv_block": self.kv_block})
        if any(size % self.probe for size in blocks.values()):
            wanted = " and ".join(f"{name} {size}" for name, size in blocks.items())
            raise DitAttnError(f"{self.slug}.probe must divide {wanted}, got {self.probe}")

    def _check_control(self) -> None:
        others = {
            "densities": self.densities is not None,
            "top_p": self.top_mass is not None,
            "threshold": self.threshold is not None,
            "selector measured": self.selector == MEASURED,
            "densities of single heads": isinstance(self.budget_of_blocks, tuple),
        }
        for name, is_given in others.items():
            if is_given:
                raise DitAttnError(f"{self.slug}.target_error decides the density of every layer; leave out {name}")

    # -- what a method says ------------------------------------------------------------------------------------------

    @property
    def budget_of_blocks(self) -> HeadBudget | None:
        """The density, ``None`` with ``top_p`` or ``threshold`` alone."""
        density: HeadBudget | None = getattr(self, "density", None)
        return density

    @property
    def top_mass(self) -> HeadBudget | None:
        """The softmax mass to reach, ``None`` where there is none."""
        mass: HeadBudget | None = getattr(self, "top_p", None)
        return mass

    @property
    def tokens_per_stand_in(self) -> int | None:
        """Tokens per pooled key that stands for a skipped block in the softmax; ``None`` where none does."""
        return None

    def rows_of(self, call: AttentionCall, request: Request) -> PermutedTokens:
        """Return the tensors of a call in the order in which the method cuts blocks."""
        raise NotImplementedError

    def forced_of(self, rows: PermutedTokens) -> torch.Tensor | None:
        """Return (1, 1, nq, nk) bool, the blocks that are attended to in any case, inside the budget."""
        raise NotImplementedError

    @property
    def fine_share(self) -> float:
        """Share of the key blocks, the best of the skipped ones, that finer pooled keys stand for."""
        return 0.0

    @property
    def stand_in_cost(self) -> float:
        """What compensation computes at a sparse step, as a fraction of dense attention."""
        return 0.0

    # -- cost --------------------------------------------------------------------------------------------------------

    @property
    def selection_cost(self) -> float:
        """What ranking computes at a step, as a fraction of dense attention; products of whole blocks are nothing."""
        return RULES[self.selector].cost(self._tokens_per_mean) if self.selector in RULES else 0.0

    @property
    def sparse_share(self) -> float | None:
        """Attention that a sparse step computes, as a fraction of dense; ``None`` where the budget does not say."""
        chosen = (self.top_mass, self.threshold, self.target_error)
        if self.budget_of_blocks is None or any(x is not None for x in chosen):
            return None
        return min(1.0, mean_budget(self.budget_of_blocks) + self.stand_in_cost + self.selection_cost)

    @property
    def executed(self) -> float | None:
        """:attr:`sparse_share`; of ``measured`` the mean over a period, in which one step is exact."""
        return None if self.sparse_share is None else self.over_period(self.sparse_share)

    def over_period(self, sparse: float) -> float:
        """Return the mean cost of a step, from that of a sparse step and 1 for a refresh."""
        return (1.0 + (self.period - 1) * sparse) / self.period if self.selector == MEASURED else sparse

    def relative_time(self, ratio: Callable[[float], float], grid: Grid) -> float | None:
        """Return the mean over a period; arguments as in the base class."""
        if self.executed is None or self.expected is None:
            return None
        share = self.expected
        if self.selector == MEASURED:
            share = (self.expected * self.period - 1.0) / (self.period - 1)
        return self.over_period(ratio(max(share, 1e-6)))

    def cache_bytes(self, tokens: int, heads: int, head_dim: int, element: int) -> int:
        """Return the bytes of the mask that ``measured`` stores, at most. Arguments as in the base class."""
        if self.selector != MEASURED:
            return 0
        nk = -(-tokens // self.kv_block)
        shares: list[float] = [1.0] * (2 if self.fine_share else 1)
        if self.spread == "row" and self.sparse_share is not None and self.budget_of_blocks is not None:
            density = self.budget_of_blocks
            shares[0] = max(density) if isinstance(density, tuple) else density
            shares[1:] = [self.fine_share] if self.fine_share else []
        widest = tuple(blocks_of_density(share, nk) for share in shares)
        blocks = self.q_block, self.kv_block
        return mask_bytes(tokens, heads, head_dim, element, blocks, widest, self.drift is not None)

    def phases(self, steps: int) -> tuple[Phase, ...]:
        """Return the first refresh and the sparse step after it where the mask is measured, else as in the base."""
        if self.selector != MEASURED:
            return super().phases(steps)
        first, last = self.sparse_range(steps)
        if last - first < 2:
            return ()
        return Phase("refresh", first), Phase("sparse", first + 1, self.period - 1)

    def synchronized(self) -> SelectingMethod:
        """Return the method with ``stagger`` off: all layers refresh at the same steps."""
        return replace(self, stagger=False) if self.selector == MEASURED else self

    # -- selection ---------------------------------------------------------------------------------------------------

    @property
    def _tokens_per_mean(self) -> int | None:
        return self.probe or RULES[self.selector].own_probe(self.q_block, self.kv_block)

    def selector_input(self, rows: PermutedTokens, scale: float) -> SelectorInput:
        """Return a call as its selector sees it."""
        probe = None if self.selector == MEASURED else self._tokens_per_mean
        return SelectorInput(rows, self.q_block, self.kv_block, scale, probe, self.tokens_per_stand_in)

    def select(self, rows: PermutedTokens, call: AttentionCall, request: Request) -> Selection:
        """Return the blocks of a sparse step, and note what ranking them computes."""
        given = self.selector_input(rows, call.softmax_scale)
        if self.selector == MEASURED:
            mask: MeasuredMask = call.layer.state[self._key(call)]
            mask.watch(given)
            return mask.selection
        request.selection_cost = self.selection_cost
        rule = RULES[self.selector]
        return self._chosen(rule.rank(given), rule.forced(given), rows, call)

    def _chosen(
        self, ranking: Ranking, own: torch.Tensor | None, rows: PermutedTokens, call: AttentionCall
    ) -> Selection:
        """The blocks for the budget, with those that the rule forces of its own."""
        forced = self.forced_of(rows)
        if own is not None:
            forced = own if forced is None else forced | own
        density, top_p = (
            None if x is None else budget_of_call(x, call) for x in (self.budget_of_blocks, self.top_mass)
        )
        budget = BlockBudget(density, top_p, self.threshold, self.spread)
        return self.complete(budget.choose(ranking, forced, self.sizes_of(rows)), ranking, rows)

    def complete(self, layout: BlockLayout, ranking: Ranking, rows: PermutedTokens) -> Selection:
        """Return the selection that belongs to the chosen blocks, with whatever else the method chooses by rank."""
        return Selection(layout)

    def sizes_of(self, rows: PermutedTokens) -> tuple[int, int, int, int]:
        """Return query and key tokens, and tokens per query and key block."""
        return rows.q.shape[1], rows.k.shape[1], self.q_block, self.kv_block

    # -- measured ----------------------------------------------------------------------------------------------------

    def request(self, call: AttentionCall, request: Request) -> None:
        """Plan the call, or decline it; with ``measured`` refresh, or plan from the last refresh.

        Raises:
            DitAttnError: ``measured`` or ``target_error``, and the call is differentiated.
        """
        if self.target_error is not None:
            plan_controlled(self, self.target_error, mean_budget(self.budget_of_blocks or 1.0), call, request)
            return
        if self.selector != MEASURED or self.at(call) is not self:
            super().request(call, request)
            return
        if torch.is_grad_enabled() and call.q.requires_grad:
            raise DitAttnError(
                f"{self.slug} with selector measured cannot be trained: its masks are of earlier steps of one run; "
                "train with another selector, or sample under torch.no_grad()"
            )
        states, key = call.layer.state, self._key(call)
        mask: MeasuredMask | None = states.get(key)
        schedule = RefreshSchedule(self.period, self.stagger, self.dense_steps, self.dense_last_steps)
        reason, last = call.layer.stateless or self.exception(call), schedule.ends(call)
        due = schedule.due(call, None if mask is None else mask.step) or self._outdated(mask)
        early = reason == "dense step" and mask is None and schedule.early(call)
        if early or (reason is None and due and not last):
            self._refresh(call, request, states, key)
        elif reason is not None or mask is None or due:
            request.decline(reason or "dense step")
        else:
            request.max_error = self.max_error
            self.plan(call, request)
        if last:  # no later step needs it
            states.pop(key, None)

    def _key(self, call: AttentionCall) -> Any:
        return call.branches, call.layer.rows, call.q.shape

    def _outdated(self, mask: MeasuredMask | None) -> bool:
        """Whether a mask is for another budget, or its queries or keys have turned away."""
        if mask is None or mask.density != self.budget_of_blocks:
            return True
        return self.drift is not None and mask.drift is not None and mask.drift.read()[0] > self.drift

    def _refresh(self, call: AttentionCall, request: Request, states: dict[Any, Any], key: Any) -> None:
        rows = self.rows_of(call, request)
        given = self.selector_input(rows, call.softmax_scale)
        stand_ins = self.tokens_per_stand_in if self.measure == "error" else None
        request.visual_density = 1.0 + (0.0 if stand_ins is None else 1.0 / stand_ins)

        def visual() -> torch.Tensor:
            stats = measure(given, self.measure)
            chosen = self._chosen(ranking_of(given, stats, self.measure), None, rows, call)
            means = None if self.drift is None else block_means_of(given)
            states[key] = MeasuredMask(call.clock.step, self.budget_of_blocks, chosen, means)
            return rows.unpermute(stats.out)

        request.compute_visual = visual
