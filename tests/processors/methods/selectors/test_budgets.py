"""Budgets: who shares the blocks, whatever ranked them."""

from __future__ import annotations

import math

import pytest
import torch

from dit_attn import BlockSparse, DitAttnError, RectifiedSpaAttn
from dit_attn.processors.methods.selectors.base import Ranking
from dit_attn.processors.methods.selectors.budgets import SPREADS, BlockBudget

SIZES = (80, 96, 8, 8)


def ranking(level: bool = True) -> Ranking:
    draw = torch.Generator().manual_seed(0)
    scores = torch.randn(2, 3, 10, 12, generator=draw) * torch.linspace(0.5, 3, 10)[:, None]
    scores[1, :, :, 9:] = float("-inf")
    return Ranking(scores, scores.logsumexp(-1, keepdim=True) if level else None)


@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize("spread", SPREADS)
def test_a_spread_takes_the_best_of_all_that_share(spread: str, forced: bool) -> None:
    ranks = ranking()
    fixed = torch.zeros(1, 1, 10, 12, dtype=torch.bool)
    fixed[..., 5] = forced
    mask = BlockBudget(0.25, spread=spread).choose(ranks, fixed if forced else None, SIZES).block_mask()
    assert mask.any(-1).all() and not mask[1, :, :, 9:].any()
    assert not forced or bool(mask[..., 5].all())
    shared = {"row": (-1,), "head": (-1, -2), "layer": (-1, -2, -3)}[spread]
    assert set(mask.sum(shared).flatten().tolist()) == {3 * math.prod(mask.shape[axis] for axis in shared[1:])}
    # apart from forced blocks and the best of each row, nothing chosen is worse than anything left
    scores = ranks.comparable
    best = torch.zeros_like(mask).scatter_(-1, scores.argmax(-1, keepdim=True), True)
    taken = scores.masked_fill(~mask | best | (fixed & forced), float("inf")).amin(shared)
    left = scores.masked_fill(mask, float("-inf")).amax(shared)
    assert bool((taken >= left).all())


def test_heads_with_densities_of_their_own_share_with_nobody_or_with_the_layer() -> None:
    ranks = ranking()
    mask = BlockBudget((0.1, 0.25, 0.5), spread="head").choose(ranks, None, SIZES).block_mask()
    assert mask.sum((-1, -2))[0].tolist() == [20, 30, 60]
    mask = BlockBudget((0.1, 0.25, 0.5), spread="layer").choose(ranks, None, SIZES).block_mask()
    assert mask.sum((-1, -2, -3)).tolist() == [110, 110]


def test_a_threshold_holds_everywhere_and_adds_to_a_density() -> None:
    ranks = ranking()
    alone = BlockBudget(threshold=-2.0).choose(ranks, None, SIZES).block_mask()
    best = torch.zeros_like(alone).scatter_(-1, ranks.comparable.argmax(-1, keepdim=True), True)
    assert torch.equal(alone, (ranks.comparable > -2.0) | best)
    both = BlockBudget(0.25, threshold=-2.0).choose(ranks, None, SIZES).block_mask()
    rows = BlockBudget(0.25).choose(ranks, None, SIZES).block_mask()
    assert torch.equal(both, alone | rows)


@pytest.mark.parametrize("spread", SPREADS)
def test_the_next_best_are_none_of_the_chosen(spread: str) -> None:
    ranks, budget = ranking(), BlockBudget(0.25, spread=spread)
    chosen = budget.choose(ranks, None, SIZES)
    more = budget.next_best(0.25, ranks, chosen, SIZES).block_mask()
    assert not (more & chosen.block_mask()).any()
    if spread == "row":
        half = BlockBudget(0.5).choose(ranks, None, SIZES).block_mask()
        assert torch.equal(more | chosen.block_mask(), half)


def test_settings_that_say_two_things_are_refused() -> None:
    with pytest.raises(DitAttnError, match=r"block-sparse.top_p sets the number of blocks of every row"):
        BlockSparse(top_p=0.9, spread="head")
    with pytest.raises(DitAttnError, match=r"top_p sets.*leave out spread and threshold"):
        RectifiedSpaAttn(top_p=0.9, threshold=-3.0)
    with pytest.raises(DitAttnError, match="not both"):
        BlockSparse(top_p=0.9, density=0.2)
    alone = BlockSparse(selector="sol", threshold=1.0)
    assert alone.density is None and alone.executed is None and not alone.is_dense
    assert BlockSparse(threshold=-3.0, density=0.1).density == 0.1
