"""Fills: read from the spectrum with their period at every size, and told from an enlarged image."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dit_attn.eval.shapes_world.fills import DEPTH, FILLS, PERIOD, Fill, read_fill, shade


def _disk(size: int, radius: float) -> np.ndarray:
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    return np.hypot(x, y) < radius


def _pixels(kind: str, size: int, seed: int, noise: float = 0.03) -> np.ndarray:
    generator = torch.Generator().manual_seed(seed)
    factor = shade(torch.tensor([FILLS.index(kind)]), torch.rand(1, 2, generator=generator), size, size)[0]
    image = torch.tensor([0.9, 0.12, 0.12]) * factor[..., None]
    return (image + noise * torch.randn(image.shape, generator=generator)).numpy()


@pytest.mark.parametrize("size", [64, 128, 256])
@pytest.mark.parametrize("kind", FILLS)
def test_kind_and_period_are_read_at_every_size(kind, size):
    found = [read_fill(_pixels(kind, size, seed), _disk(size, 0.16 * size)) for seed in range(4)]
    assert {one.kind for one in found} == {kind}
    assert all(one.period_is_right for one in found)


@pytest.mark.parametrize("kind", FILLS[1:])
def test_an_enlarged_image_has_twice_the_period(kind):
    import torch.nn.functional as F

    small = torch.from_numpy(_pixels(kind, 128, 0)).permute(2, 0, 1)[None]
    large = F.interpolate(small, scale_factor=2, mode="bicubic")[0].permute(1, 2, 0).numpy()
    found = read_fill(large, _disk(256, 40))
    assert found.kind == kind and found.period == pytest.approx(2 * PERIOD, abs=1.0) and not found.period_is_right


def test_a_slope_of_brightness_is_no_fill():
    slope = np.linspace(0.3, 0.9, 64)[:, None, None] * np.ones((1, 64, 3))
    assert read_fill(slope, _disk(64, 12)) == Fill("plain", 0.0)


def test_a_few_pixels_have_no_fill():
    assert read_fill(np.random.default_rng(0).random((16, 16, 3)), _disk(16, 2)) == Fill("plain", 0.0)


def test_shade_stays_in_its_range_and_turns_with_the_axes():
    kinds, phase = torch.tensor([0, 1, 2, 3]), torch.zeros(4, 2)
    plain, striped, barred, dotted = shade(kinds, phase, 32, 32)
    assert torch.equal(plain, torch.ones(32, 32)) and torch.equal(striped, barred.T) and torch.equal(dotted, dotted.T)
    assert float(striped.min()) == pytest.approx(1 - DEPTH) and float(striped.max()) == 1.0
    assert torch.allclose(striped[8:], striped[:-8], atol=1e-5)
