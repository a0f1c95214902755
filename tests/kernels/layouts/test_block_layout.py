"""Layouts and selection: what is chosen, in which order of precedence, and that nothing is lost in the lists."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_attn.errors import DitAttnError
from dit_attn.kernels import BlockLayout, block_scores, pool_blocks, select_blocks

EXAMPLES = settings(max_examples=60, deadline=None, derandomize=True)


def sizes(nq: int, nk: int, block: int = 4) -> dict[str, int]:
    return {"q_len": nq * block, "kv_len": nk * block, "q_block": block, "kv_block": block}


@EXAMPLES
@given(st.integers(1, 50), st.integers(1, 50), st.sampled_from((4, 7)), st.sampled_from((4, 9)), st.integers(0, 99))
def test_a_block_mask_survives_the_round_trip(q_len: int, kv_len: int, q_block: int, kv_block: int, seed: int) -> None:
    blocks = (-(-q_len // q_block), -(-kv_len // kv_block))
    mask = torch.rand(2, 3, *blocks, generator=torch.Generator().manual_seed(seed)) < 0.4
    layout = BlockLayout.from_mask(mask, q_len, kv_len, q_block, kv_block)
    assert torch.equal(layout.block_mask(), mask)
    assert layout.density == pytest.approx(float(mask.float().mean()))
    q, k = torch.arange(q_len) // q_block, torch.arange(kv_len) // kv_block
    assert torch.equal(layout.materialize(), mask[:, :, q][..., k])
    assert layout == BlockLayout.from_mask(layout.block_mask(), q_len, kv_len, q_block, kv_block)


@EXAMPLES
@given(st.integers(1, 40), st.floats(0.01, 1.0))
def test_density_keeps_its_ceiling_of_blocks_the_best_ones(nk: int, density: float) -> None:
    scores = torch.randn(1, 2, 3, nk, generator=torch.Generator().manual_seed(nk))
    layout = select_blocks(scores, density=density, **sizes(3, nk))
    count = math.ceil(density * nk - 1e-9)
    assert (layout.kv_num_blocks == count).all()
    mask = layout.block_mask()
    best = scores.masked_fill(~mask, float("inf")).amin(-1)
    rest = scores.masked_fill(mask, float("-inf")).amax(-1)
    assert (best >= rest).all()


def test_forced_blocks_take_their_place_inside_the_budget() -> None:
    scores = torch.arange(8.0).expand(1, 1, 2, 8)
    forced = torch.zeros(1, 1, 2, 8, dtype=torch.bool)
    forced[..., 0, 0] = True
    forced[..., 1, :5] = True
    mask = select_blocks(scores, density=0.25, forced=forced, **sizes(2, 8)).block_mask()
    assert mask[0, 0, 0].nonzero().flatten().tolist() == [0, 7]
    assert mask[0, 0, 1].nonzero().flatten().tolist() == [0, 1, 2, 3, 4]


def test_equal_scores_go_to_the_lower_index() -> None:
    scores = torch.zeros(1, 1, 2, 10)
    scores[..., 9] = 1.0
    mask = select_blocks(scores, density=0.3, **sizes(2, 10)).block_mask()
    assert (mask.nonzero()[:, -1].view(2, 3) == torch.tensor([0, 1, 9])).all()


@EXAMPLES
@given(st.integers(1, 24), st.floats(0.05, 0.99), st.integers(0, 99))
def test_top_p_keeps_the_fewest_blocks_that_reach_the_mass(nk: int, p: float, seed: int) -> None:
    scores = 3 * torch.randn(1, 1, 4, nk, generator=torch.Generator().manual_seed(seed))
    layout = select_blocks(scores, top_p=p, **sizes(4, nk))
    mass = scores.double().softmax(-1)
    chosen = (mass * layout.block_mask()).sum(-1)
    assert (chosen >= p - 1e-5).all()
    ranked = mass.sort(-1, descending=True).values.cumsum(-1)
    fewer = (layout.kv_num_blocks.long() - 2).clamp(min=0)[..., None]
    assert ((ranked.gather(-1, fewer)[..., 0] < p + 1e-5) | (layout.kv_num_blocks == 1)).all()


def test_top_p_of_one_keeps_everything() -> None:
    scores = 40 * torch.randn(1, 1, 3, 6)
    assert select_blocks(scores, top_p=1.0, **sizes(3, 6)).density == 1.0


def test_pooling_is_the_mean_of_the_tokens_that_exist() -> None:
    x, mask = torch.randn(2, 22, 3, 4), torch.rand(2, 22) < 0.6
    mask[0, 8:16] = False
    pooled = pool_blocks(x, 8, mask)
    for b in range(2):
        for i in range(3):
            rows = x[b, 8 * i : 8 * i + 8][mask[b, 8 * i : 8 * i + 8]]
            expected = rows.mean(0) if len(rows) else torch.zeros(3, 4)
            torch.testing.assert_close(pooled[b, :, i], expected)


def test_a_block_without_a_key_is_never_chosen() -> None:
    q, k = torch.randn(1, 16, 1, 4), torch.randn(1, 32, 1, 4)
    mask = torch.ones(1, 32, dtype=torch.bool)
    mask[0, 8:16] = False
    scores = block_scores(q, k, 8, 8, key_mask=mask)
    chosen = select_blocks(scores, density=1.0, q_len=16, kv_len=32, q_block=8, kv_block=8).block_mask()
    assert not chosen[..., 1].any() and chosen[..., [0, 2, 3]].all()


@pytest.mark.parametrize("budget", ({}, {"density": 0.5, "top_p": 0.5}, {"density": 0.0}, {"top_p": 1.5}))
def test_a_bad_budget_is_refused_in_one_line(budget: dict[str, float]) -> None:
    with pytest.raises(DitAttnError) as caught:
        select_blocks(torch.randn(1, 1, 2, 4), **budget, **sizes(2, 4))
    assert "\n" not in str(caught.value)
