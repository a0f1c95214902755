"""Static layouts: exactly the pairs of the rule, blocks classified exactly, and nothing of S x S on the way."""

from __future__ import annotations

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
    sink_window,
    to_flex,
)
from tests._support.kernel_cases import LAYOUTS, holds

EXAMPLES = settings(max_examples=60, deadline=None, derandomize=True)
BLOCKS = st.sampled_from((4, 5, 8, 16))


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


def test_static_layouts_are_made_once() -> None:
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


def test_a_band_that_cannot_be_is_refused() -> None:
    with pytest.raises(DitAttnError, match="at least 0"):
        band(4, 4, -1, 0)
    with pytest.raises(DitAttnError, match=r"must be \(B, Sq\)"):
        from_segments(torch.zeros(3))
