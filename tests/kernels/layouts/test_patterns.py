"""Static layouts: exactly the pairs of the rule, blocks classified exactly, and nothing of S x S on the way."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_attn.errors import DitAttnError
from dit_attn.kernels import (
    BlockLayout,
    band,
    from_flex,
    from_lengths,
    from_segments,
    inward_window,
    sink_window,
    to_flex,
)
from tests._support.kernel_cases import LAYOUTS

EXAMPLES = settings(max_examples=60, deadline=None, derandomize=True)
BLOCKS = st.sampled_from((4, 5, 8, 16))


def holds(layout: BlockLayout, pairs: torch.Tensor) -> None:
    """The layout has exactly ``pairs`` (.., Sq, Sk); partial blocks are those that are neither empty nor full."""
    layout.check()
    lead = layout.kv_num_blocks.shape[:2]
    assert torch.equal(layout.materialize(), pairs.expand(*lead, -1, -1))
    queries, keys = -(-layout.q_len // layout.q_block), -(-layout.kv_len // layout.kv_block)
    for row in range(queries):
        for column in range(keys):
            tile = pairs[..., row * layout.q_block :, column * layout.kv_block :]
            tile = tile[..., : layout.q_block, : layout.kv_block].flatten(-2)
            assert torch.equal(layout.block_mask()[..., row, column], tile.any(-1).expand(lead))
            assert torch.equal(layout.full_mask()[..., row, column], tile.all(-1).expand(lead))
    assert layout.token_density == pytest.approx(float(pairs.double().mean()), abs=1e-12)


@st.composite
def windows(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...]]:
    grid = tuple(draw(st.lists(st.integers(1, 7), min_size=1, max_size=3)))
    return grid, tuple(draw(st.integers(1, n)) for n in grid)


@EXAMPLES
@given(windows(), BLOCKS, BLOCKS, st.sampled_from((0, 3, 9)), st.sampled_from((0, 5)), st.booleans())
def test_a_window_attends_to_the_neighbors_and_the_text(
    sizes: tuple[tuple[int, ...], tuple[int, ...]], q_block: int, kv_block: int, before: int, after: int, inward: bool
) -> None:
    grid, window = sizes
    cells = math.prod(grid)
    read, rest = torch.ones(cells, cells, dtype=torch.bool), torch.arange(cells)
    for n, size in reversed(list(zip(grid, window))):
        place, rest = rest % n, rest // n
        start = place - size // 2
        start = start.clamp(0, n - size) if inward else start
        read &= (place >= start[:, None]) & (place < start[:, None] + size)
    if inward:
        assert (read.sum(1) == math.prod(window)).all()  # equally many keys for every query
    pairs = torch.ones(before + cells + after, before + cells + after, dtype=torch.bool)
    pairs[before : before + cells, before : before + cells] = read
    blocks = {"q_block": q_block, "kv_block": kv_block}
    holds(inward_window(grid, window, text_before=before, text_after=after, inward=inward, **blocks), pairs)


@EXAMPLES
@given(
    st.integers(1, 60), st.integers(1, 60), st.integers(0, 20), st.integers(0, 20), st.sampled_from((0, 5, 13)),
    st.sampled_from((0, 7, -4)), BLOCKS, BLOCKS,
)  # fmt: skip
def test_a_band_attends_to_its_diagonal_and_its_sinks(
    q_len: int, kv_len: int, before: int, after: int, sinks: int, shift: int, q_block: int, kv_block: int
) -> None:
    distance = torch.arange(kv_len) - torch.arange(q_len)[:, None] - shift
    pairs = ((distance >= -before) & (distance <= after)) | (torch.arange(kv_len) < sinks)
    layout = band(q_len, kv_len, before, after, sinks=sinks, q_shift=shift, q_block=q_block, kv_block=kv_block)
    holds(layout, pairs)


@EXAMPLES
@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 99), BLOCKS, BLOCKS)
def test_packed_sequences_attend_to_themselves_only(
    q_len: int, kv_len: int, seed: int, q_block: int, kv_block: int
) -> None:
    rng = torch.Generator().manual_seed(seed)
    q_ids, k_ids = (torch.randint(0, 4, (2, n), generator=rng).sort(-1).values for n in (q_len, kv_len))
    layout = from_segments(q_ids, k_ids, q_block=q_block, kv_block=kv_block).check()
    assert torch.equal(layout.materialize()[:, 0], q_ids[:, :, None] == k_ids[:, None])


def test_large_segment_numbers_are_distinguished() -> None:
    ids = torch.tensor([[2**24] * 8 + [2**24 + 1] * 8 + [-(2**31)] * 3])  # fp32 does not hold the second
    pairs = ids[0][:, None] == ids[0]
    for kind in (torch.int32, torch.int64):
        assert torch.equal(from_segments(ids.to(kind), q_block=16, kv_block=4).check().materialize()[0, 0], pairs)


def test_lengths_say_where_packed_sequences_end() -> None:
    layout = from_lengths(torch.tensor([5, 0, 7]), 15, q_block=4, kv_block=4)
    part = torch.tensor([0] * 5 + [1] * 7 + [2] * 3)
    holds(layout, part[:, None] == part)


def test_a_sink_window_is_a_band_with_sinks() -> None:
    assert sink_window(64, 8, 9, q_block=8, kv_block=8) == band(64, 64, 4, 4, sinks=8, q_block=8, kv_block=8)
    assert sink_window(64, 8, 8, q_block=8, kv_block=8).materialize()[0, 0, 40].sum() == 8 + 8


def test_a_window_as_large_as_the_grid_is_dense() -> None:
    layout = inward_window((3, 4, 5), 99, q_block=8, kv_block=8, text_after=3)
    assert layout.elements is None and layout.is_dense


def test_static_layouts_are_made_once() -> None:
    layout = inward_window((9, 46, 80), (5, 15, 21))
    assert inward_window((9, 46, 80), (5, 15, 21)) is layout
    assert layout.token_density == pytest.approx(5 * 15 * 21 / (9 * 46 * 80), rel=1e-9)
    assert BlockLayout.dense(300, 200) is BlockLayout.dense(300, 200, device="cpu")
    assert band(300, 200, 5, 5) is band(300, 200, 5, 5)


@pytest.mark.parametrize("name", LAYOUTS)
def test_reverse_lists_have_the_same_blocks(name: str) -> None:
    layout = LAYOUTS[name]()
    lists = layout.reverse_lists()
    for full, count in ((True, lists.full_q_num_blocks), (False, lists.q_num_blocks)):
        assert count is not None
        expected = layout.full_mask() if full else layout.block_mask()
        listed = torch.arange(lists.q_indices.shape[-1]) < count[..., None]
        index = torch.where(listed, lists.q_indices.long(), layout.nq)
        found = torch.zeros(*count.shape, layout.nq + 1, dtype=torch.bool).scatter(-1, index, True)[..., : layout.nq]
        assert torch.equal(found.mT, expected)


@pytest.mark.parametrize("name", LAYOUTS)
def test_flexattentions_masks_come_and_go(name: str) -> None:
    layout = LAYOUTS[name]()
    assert torch.equal(from_flex(to_flex(layout)).materialize(), layout.materialize())
    assert torch.equal(layout.to("cpu").materialize(), layout.materialize()) and layout.to("cpu") == layout


def test_a_window_that_cannot_be_is_refused() -> None:
    for arguments, message in (
        (((4, 4), (3,)), "one size for each"),
        (((2, 2, 2, 2), 1), "one size for each"),
        (((4, 0), 1), "must be positive"),
        (((4, 4), (3, 5)), "must lie between"),
    ):
        with pytest.raises(DitAttnError, match=message):
            inward_window(*arguments, inward=False)  # type: ignore[arg-type]
    with pytest.raises(DitAttnError, match="at least 0"):
        band(4, 4, -1, 0)
    with pytest.raises(DitAttnError, match=r"must be \(B, Sq\)"):
        from_segments(torch.zeros(3))
