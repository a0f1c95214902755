"""Token orders: permutations that keep blocks compact, leave text alone and can be undone exactly."""

from __future__ import annotations

import itertools
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_attn.errors import DitAttnError
from dit_attn.kernels.layouts.cache import CACHE_SIZE
from dit_attn.kernels.layouts.token_order import (
    ORDERS,
    TokenOrder,
    _cached_order,
    block_neighbors,
    exact_box,
    token_order,
)

SIZES = st.integers(1, 13)
EXAMPLES = settings(max_examples=60, deadline=None, derandomize=True)


def steps(order: TokenOrder) -> torch.Tensor:
    """(S - 1, 3), how far each token is from the one before."""
    places = order.coordinates()
    return (places[1:] - places[:-1]).abs()


def block_volume(order: TokenOrder, block: int = 128) -> float:
    """Mean volume of the bounding box of a full block."""
    full = len(order) // block * block
    places = order.coordinates()[:full].view(-1, block, 3)
    return float((places.amax(1) - places.amin(1) + 1).prod(-1).double().mean())


@EXAMPLES
@given(st.sampled_from(sorted(ORDERS)), SIZES, SIZES, SIZES, st.tuples(*[st.integers(1, 5)] * 3))
def test_every_order_is_a_permutation_with_its_inverse(
    name: str, t: int, h: int, w: int, tile: tuple[int, int, int]
) -> None:
    plan = token_order(name, (t, h, w), tile=tile)
    everything = torch.arange(t * h * w)
    assert torch.equal(plan.order.sort().values, everything)
    assert torch.equal(plan.order[plan.inverse], everything)
    assert torch.equal(plan.inverse[plan.order], everything)


@EXAMPLES
@given(
    st.sampled_from(sorted(ORDERS)),
    st.integers(0, 5),
    st.integers(0, 5),
    st.sampled_from((0, 1, 2, -1)),
    st.sampled_from((torch.bfloat16, torch.float32, torch.int32)),
)
def test_the_round_trip_is_exact_and_text_stays(
    name: str, before: int, after: int, dim: int, dtype: torch.dtype
) -> None:
    plan = token_order(name, (3, 5, 4))
    shape = [2, 3, 2]
    shape[dim] = before + len(plan) + after
    x = torch.randn(shape).mul(100).to(dtype)
    there = plan.apply(x, dim, before)
    assert torch.equal(plan.undo(there, dim, before), x)
    y, z = x.movedim(dim, 0), there.movedim(dim, 0)
    assert torch.equal(z[:before], y[:before])
    assert torch.equal(z[before + len(plan) :], y[before + len(plan) :])
    assert torch.equal(z[before : before + len(plan)], y[before : before + len(plan)][plan.order])


def test_the_identity_copies_nothing() -> None:
    x = torch.randn(2, 30, 3)
    assert token_order("identity", (2, 3, 5)).apply(x) is x


@pytest.mark.parametrize("grid", itertools.product((2, 4, 6, 10), repeat=3))
def test_the_curve_never_leaves_the_neighbourhood_in_even_grids(grid: tuple[int, int, int]) -> None:
    assert (steps(token_order("hilbert", grid)).sum(-1) == 1).all()


@pytest.mark.parametrize("axis", range(3))
def test_the_curve_never_leaves_the_neighbourhood_in_planes(axis: int) -> None:
    for sides in itertools.product(range(1, 12), repeat=2):
        grid = [*sides[:axis], 1, *sides[axis:]]
        walked = steps(token_order("hilbert", tuple(grid)))
        assert (walked.sum(-1) == 1).all(), grid


@pytest.mark.parametrize("grid", [(21, 30, 52), (21, 45, 80), (13, 30, 45), (31, 22, 40), (32, 45, 80)])
def test_the_curve_rarely_and_only_just_skips_in_odd_grids(grid: tuple[int, int, int]) -> None:
    plan = token_order("hilbert", grid)
    walked = steps(plan)
    assert (walked.sum(-1) > 1).float().mean() < 0.01
    assert walked.amax() <= 2
    assert plan.order[0] == 0


@pytest.mark.parametrize("grid", [(21, 30, 52), (13, 30, 45), (32, 45, 80)])
def test_blocks_are_more_compact_than_row_major_ones(grid: tuple[int, int, int]) -> None:
    plain = block_volume(token_order("identity", grid))
    assert block_volume(token_order("hilbert", grid)) < 0.6 * plain
    assert block_volume(token_order("tiles", grid)) < 0.6 * plain


def test_tiles_that_divide_the_grid_are_exact_boxes_that_touch_the_one_before() -> None:
    plan = token_order("tiles", (8, 12, 16), tile=(4, 4, 8))
    assert block_volume(plan) == 128.0
    corners = plan.coordinates().view(-1, 128, 3).amin(1) // torch.tensor([4, 4, 8])
    assert ((corners[1:] - corners[:-1]).abs().sum(-1) == 1).all()


def test_time_is_innermost_in_a_tile() -> None:
    places = token_order("tiles", (4, 8, 8), tile=(4, 2, 2)).coordinates()
    assert places[:6].tolist() == [[0, 0, 0], [1, 0, 0], [2, 0, 0], [3, 0, 0], [0, 0, 1], [1, 0, 1]]


@pytest.mark.parametrize("frames", [1, 2, 3, 4, 9])
def test_the_default_tile_fills_one_block_whatever_the_frames(frames: int) -> None:
    plan = token_order("tiles", (frames, 48, 112))
    tokens = 126 if frames == 3 else 128
    if frames != 9:  # the last group of frames is cut off there
        assert block_volume(plan, tokens) == tokens


def test_touching_blocks_are_found_as_by_brute_force() -> None:
    for name in ORDERS:
        plan = token_order(name, (3, 4, 5), tile=(2, 2, 2))
        places, owner = plan.coordinates(), torch.arange(len(plan)) // 7
        near = (places[:, None] - places[None]).abs().amax(-1) <= 1
        n = int(owner[-1]) + 1
        expected = torch.zeros(n, n, dtype=torch.bool)
        expected[owner[:, None].expand_as(near)[near], owner[None].expand_as(near)[near]] = True
        assert torch.equal(block_neighbors(plan, block=7), expected)


def test_an_order_is_built_once_and_the_store_is_bounded() -> None:
    assert token_order("hilbert", (3, 4, 5)) is token_order("hilbert", (3, 4, 5), tile=(2, 2, 2))
    assert token_order("hilbert", (4, 5)).grid == (1, 4, 5)
    for w in range(1, CACHE_SIZE + 5):
        token_order("identity", (1, 1, w))
    assert _cached_order.cache_info().currsize <= CACHE_SIZE


def test_a_video_of_full_length_is_planned_within_a_second() -> None:
    _cached_order.cache_clear()
    began = time.process_time()  # other processes may hold the machine
    token_order("hilbert", (21, 30, 52))
    assert time.process_time() - began < 1.0


def test_gradients_go_back_to_their_tokens() -> None:
    x = torch.randn(1, 12, 2, dtype=torch.float64, requires_grad=True)
    plan = token_order("hilbert", (2, 2, 2))
    assert torch.autograd.gradcheck(lambda y: plan.apply(y, 1, 3), x)


@pytest.mark.parametrize(
    "call",
    [
        lambda: token_order("hilbrt", (2, 3, 4)),
        lambda: token_order("hilbert", (2, 0, 4)),
        lambda: token_order("hilbert", (2,)),
        lambda: token_order("tiles", (2, 3, 4), tile=(1, 0, 1)),
        lambda: token_order("hilbert", (2, 3, 4)).apply(torch.zeros(1, 23, 2)),
        lambda: token_order("hilbert", (2, 3, 4)).undo(torch.zeros(1, 30, 2), 1, 7),
        lambda: block_neighbors(token_order("hilbert", (2, 3, 4)), block=0),
    ],
)
def test_bad_input_is_refused_in_one_line(call) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(DitAttnError) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_the_exact_box_divides_the_grid_and_is_the_most_compact() -> None:
    assert exact_box((9, 12, 12), 36) == (3, 3, 4) and exact_box((16, 16, 16), 64) == (4, 4, 4)
    assert exact_box((1, 32, 32), 32) == (1, 4, 8) and exact_box((32, 45, 80), 128) == (8, 1, 16)
    assert exact_box((21, 45, 80), 128) is None and exact_box((1, 7, 7), 6) is None
    order = token_order("tiles", (9, 12, 12), tile=exact_box((9, 12, 12), 36))
    blocks = order.coordinates().view(-1, 36, 3)
    assert ((blocks.amax(1) - blocks.amin(1)) == torch.tensor([2, 2, 3])).all()
