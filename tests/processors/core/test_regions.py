"""Regions in tokens: boxes and masks on any grid, moving ones, and what becomes of overlaps."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_attn.errors import DitAttnError
from dit_attn.processors.core.regions import bounding_box, coverage, regions_of, visual_masks
from dit_attn.processors.core.subjects import parse_subjects
from dit_attn.processors.core.tokens import Span, TokenLayout, visual_span

EDGE = st.floats(0.0, 0.49)


@settings(max_examples=30, deadline=None)
@given(EDGE, EDGE, EDGE, EDGE, st.integers(1, 9), st.integers(1, 9))
def test_coverage_is_the_area_of_a_box_token_by_token(
    x0: float, y0: float, x1: float, y1: float, height: int, width: int
) -> None:
    box = [x0, y0, 1.0 - x1, 1.0 - y1]
    covered = coverage({"piece": "a", "box": box}, (1, height, width))
    assert covered.shape == (1, height, width)
    area = (box[2] - box[0]) * (box[3] - box[1])
    assert float(covered.mean()) == pytest.approx(area, abs=1e-6)


def test_a_box_has_the_tokens_that_it_covers_by_more_than_half() -> None:
    (region,) = regions_of(parse_subjects([{"piece": "a", "box": [0.3, 0.0, 0.8, 0.5]}]), (1, 4, 4))
    assert region.reshape(4, 4).int().tolist() == [[0, 1, 1, 0], [0, 1, 1, 0], [0] * 4, [0] * 4]


def test_a_tiny_box_has_the_token_that_it_covers_most() -> None:
    (region,) = regions_of(parse_subjects([{"piece": "a", "box": [0.3, 0.3, 0.31, 0.31]}]), (1, 4, 4))
    assert region.nonzero().flatten().tolist() == [5]


def test_a_moving_box_is_at_its_ends_in_the_first_and_last_frame() -> None:
    boxes = [[0.0, 0.0, 0.25, 1.0], [0.75, 0.0, 1.0, 1.0]]
    (region,) = regions_of(parse_subjects([{"piece": "a", "boxes": boxes}]), (4, 1, 4))
    assert region.reshape(4, 4).int().tolist() == torch.eye(4, dtype=torch.int).tolist()


def test_a_mask_is_averaged_over_every_token_in_all_frames() -> None:
    mask = torch.zeros(8, 16)
    mask[:4, 4:8] = 1
    regions = regions_of(parse_subjects([{"piece": "a", "mask": mask}]), (2, 4, 8))
    expected = torch.zeros(4, 8, dtype=torch.bool)
    expected[:2, 2:4] = True
    assert torch.equal(regions.reshape(2, 4, 8), expected.expand(2, -1, -1))
    with pytest.raises(DitAttnError, match="does not fit 8 x 8"):
        regions_of(parse_subjects([{"piece": "a", "mask": mask}]), (1, 8, 8))


def test_overlapping_tokens_are_shared_or_go_to_the_larger_cover_or_the_smaller_region() -> None:
    two = parse_subjects([{"piece": "a", "box": [0, 0, 1, 1]}, {"piece": "b", "box": [0.2, 0.2, 0.6, 0.6]}])
    shared = regions_of(two, (1, 5, 5), "share")
    assert shared.sum(1).tolist() == [25, 4] and bool((shared[0] & shared[1]).any())
    for overlap in ("refuse", "smaller"):  # all tokens are covered completely: the smaller region is first
        assert regions_of(two, (1, 5, 5), overlap).sum(1).tolist() == [21, 4]
    with pytest.raises(DitAttnError, match=r"'[ab]' lies under others completely"):
        regions_of(parse_subjects([{"piece": "a", "box": [0, 0, 1, 1]}] * 1 + [{"piece": "b", "box": [0, 0, 1, 1]}]),
                   (1, 2, 2), "smaller")  # fmt: skip


def test_regions_stand_at_the_generated_image_of_the_sequence() -> None:
    layout = TokenLayout((Span("text", 3), visual_span("reference", (1, 2, 2)), visual_span("image", (1, 2, 2))))
    tokens = layout.resolve(11)
    assert tokens is not None
    regions = torch.tensor([[True, False, False, True]])
    assert visual_masks(regions, tokens)[0].nonzero().flatten().tolist() == [7, 10]


def test_the_bounding_box_of_a_region_is_in_fractions() -> None:
    region = torch.zeros(2, 4, 8, dtype=torch.bool)
    region[0, 1, 2] = region[1, 2, 5] = True
    assert bounding_box(region.flatten(), (2, 4, 8)) == (0.25, 0.25, 0.75, 0.75)
    assert bounding_box(torch.zeros(64, dtype=torch.bool), (2, 4, 8)) is None
