"""Weights of cells: bounds, scale, order, and what the paper's form does instead."""

from __future__ import annotations

import pytest
import torch

from dit_attn.processors.core.weight_map import NORMS, blurred, weight_map


def drawn(seed: int = 0, count: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Changes (N, 6, 7) and masks, the last of them empty."""
    draw = torch.Generator().manual_seed(seed)
    change = torch.rand(count, 6, 7, generator=draw) ** 3
    region = torch.rand(count, 6, 7, generator=draw) < 0.5
    region[-1] = False
    return change, region


@pytest.mark.parametrize("norm", NORMS)
def test_weights_are_bounded_inside_the_mask_and_1_outside(norm: str) -> None:
    change, region = drawn()
    weights = weight_map(change, region, norm=norm, low=0.9, high=1.7)
    assert weights.shape == change.shape and weights.dtype == torch.float32
    assert (weights[~region] == 1).all() and (weights[2] == 1).all()
    assert 0.9 - 1e-6 <= weights.min() < 1 and 1.1 < weights.max() <= 1.7


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("value", [0.0, 1e-30, 0.3, 1e6])
def test_equal_changes_weigh_1_whatever_they_are(norm: str, value: float) -> None:
    _, region = drawn()
    weights = weight_map(torch.full((3, 6, 7), value), region, norm=norm, low=0.01)
    assert torch.equal(weights, torch.ones_like(weights))


@pytest.mark.parametrize("norm", NORMS)
def test_an_untouched_part_weighs_more_than_a_painted_one(norm: str) -> None:
    region = torch.zeros(1, 6, 7, dtype=torch.bool)
    region[0, 1:3, 1:3] = region[0, 4:6, 4:6] = True
    change = torch.full((1, 6, 7), 0.4)
    change[0, 4:6, 4:6] = 0.0
    weights = weight_map(change, region, norm=norm)
    assert (weights[0, 4:6, 4:6] > 1.5).all() and (weights[0, 1:3, 1:3] == 1).all()


def test_the_unit_of_the_changes_does_not_count_except_in_the_papers_form() -> None:
    change, region = drawn()
    for norm in NORMS:
        first, other = (weight_map(factor * change, region, norm=norm, low=0.01, high=50) for factor in (1.0, 250.0))
        assert torch.allclose(first, other, rtol=1e-5) is (norm != "paper")


def test_the_papers_form_is_the_softmax_of_the_reciprocals_times_the_area() -> None:
    change, region = drawn()
    change = change + 0.5
    found = weight_map(change, region, norm="paper", low=1e-6, high=1e6)
    for d, mask, weights in zip(change[:2].double(), region[:2], found[:2]):
        expected = mask.sum() * torch.softmax(1 / d[mask], 0)
        torch.testing.assert_close(weights[mask].double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_cells_in_another_order_have_their_weights_in_that_order(norm: str) -> None:
    change, region = drawn()
    order = torch.randperm(42, generator=torch.Generator().manual_seed(1))
    moved = [x.flatten(1)[:, order].view_as(x) for x in (change, region)]
    expected = weight_map(change, region, norm=norm).flatten(1)[:, order]
    torch.testing.assert_close(weight_map(*moved, norm=norm).flatten(1), expected)


def test_means_stay_inside_the_mask() -> None:
    change, region = drawn()
    weights = weight_map(change, region, high=3.0)
    smooth = blurred(weights, region)
    assert (smooth[~region] == 1).all() and smooth[region].min() >= 1 and smooth[region].max() <= 3
    n, y, x = region.nonzero()[7].tolist()
    near = [(a, b) for a in range(max(0, y - 1), min(6, y + 2)) for b in range(max(0, x - 1), min(7, x + 2))]
    expected = torch.stack([weights[n, a, b] for a, b in near if region[n, a, b]]).mean()
    torch.testing.assert_close(smooth[n, y, x], expected)
    assert torch.equal(blurred(torch.ones(1, 4, 4), torch.ones(1, 4, 4, dtype=torch.bool)), torch.ones(1, 4, 4))
