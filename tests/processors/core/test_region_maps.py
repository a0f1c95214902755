"""Blur, Otsu's threshold against every other one, and the quality of regions."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_attn.processors.core.region_maps import (
    gaussian_blur,
    mask_quality,
    masked_mean,
    normalized,
    otsu_threshold,
    overlap_ratio,
    region_masks,
)


def within_variance(levels: torch.Tensor, threshold: int) -> float:
    """Sum of squares around the means of the two classes."""
    parts = [levels[levels <= threshold], levels[levels > threshold]]
    return sum(float(((part - part.mean()) ** 2).sum()) for part in parts if len(part))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 255), min_size=2, max_size=60))
def test_otsus_threshold_leaves_the_least_variance_within_the_classes(values: list[int]) -> None:
    levels = torch.tensor(values)
    best = min(within_variance(levels.double(), threshold) for threshold in range(256))
    assert within_variance(levels.double(), otsu_threshold(levels)) <= best + 1e-6 * (1 + best)


def test_a_constant_map_has_no_region() -> None:
    assert otsu_threshold(torch.full((9,), 7)) == 0
    for threshold in (None, 0.4):
        assert not region_masks(torch.zeros(1, 12), (1, 3, 4), threshold=threshold).any()
    assert region_masks(torch.zeros(0, 12), (1, 3, 4)).shape == (0, 12)


def test_the_blur_of_a_point_is_its_kernel_and_away_from_borders_the_sum_stays() -> None:
    point = torch.zeros(2, 11, 13, dtype=torch.float64)
    point[:, 5, 6] = 1.0
    out = gaussian_blur(point, 1.0)
    steps = torch.arange(-3, 4, dtype=torch.float64)
    kernel = torch.exp(-(steps**2) / 2)
    kernel = torch.outer(kernel, kernel) / kernel.sum() ** 2
    torch.testing.assert_close(out[1, 2:9, 3:10], kernel)
    assert float(out[0].sum()) == 1.0 or abs(float(out[0].sum()) - 1.0) < 1e-12
    assert gaussian_blur(point, 0.0) is point


def test_a_bright_square_is_found_frame_by_frame() -> None:
    maps = 0.1 * torch.rand(1, 2, 8, 9, generator=torch.Generator().manual_seed(0))
    maps[0, 1, 2:6, 3:7] += 1.0
    found = region_masks(maps.flatten(1), (2, 8, 9)).reshape(2, 8, 9)
    assert not found[0].any() and found[1, 3:5, 4:6].all() and not found[1, :, 8].any()
    assert torch.equal(normalized(torch.tensor([[1.0, 3.0, 2.0]])), torch.tensor([[0.0, 1.0, 0.5]]))


def test_masks_that_share_their_place_or_move_are_not_trusted() -> None:
    left, right = torch.tensor([True, True, False, False]), torch.tensor([False, False, True, True])
    apart, same = torch.stack([left, right]), torch.stack([left, left])
    assert mask_quality(apart).tolist() == [1.0, 1.0] and mask_quality(same).tolist() == [0.0, 0.0]
    assert mask_quality(apart, apart).tolist() == [1.0, 1.0] and mask_quality(apart, apart.flip(0)).tolist() == [0, 0]
    assert mask_quality(torch.zeros(1, 4, dtype=torch.bool)).tolist() == [0.0]
    assert overlap_ratio(apart, same).tolist() == [1.0, 0.0]


def test_the_mean_over_a_mask_is_0_where_it_is_empty() -> None:
    maps, masks = torch.tensor([[1.0, 3.0], [5.0, 7.0]]), torch.tensor([[True, True], [False, False]])
    assert masked_mean(maps, masks).tolist() == [2.0, 0.0]
