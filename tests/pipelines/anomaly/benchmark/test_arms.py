"""Cheap defects: exact masks, on the product, one seed one pair."""

from __future__ import annotations

import numpy as np
import pytest

from dit_attn.errors import DitAttnError
from dit_attn.eval.inspection_world.world import Piece, draw
from dit_attn.pipelines.anomaly.benchmark.arms import ARMS, DRAWN, Materials, check_arms, make_drawn, perlin_noise

PIECES = [draw(Piece("nut", "stain", 2**40 + i), 64) for i in range(4)]


@pytest.fixture(scope="module")
def materials():
    normals = [(one.normal * 255).round().astype(np.uint8) for one in PIECES]
    shots = [((one.image * 255).round().astype(np.uint8), one.mask) for one in PIECES[:2]]
    return Materials(normals, shots)


@pytest.mark.parametrize("arm", DRAWN)
def test_outside_its_mask_a_drawn_pair_is_a_normal_image(arm, materials):
    made = make_drawn(arm, materials, 6, (0, 5))
    for image, mask in made:
        assert image.dtype == np.uint8 and mask.dtype == bool and 0 < mask.mean() < 0.95
        sources = [normal for normal in materials.normals if (image[~mask] == normal[~mask]).all()]
        assert len(sources) == 1 and (image[mask] != sources[0][mask]).any()
    again = make_drawn(arm, materials, 2, (0, 5))
    assert all((a[0] == b[0]).all() for a, b in zip(made, again))
    assert (made[0][0] != make_drawn(arm, materials, 1, (1, 5))[0][0]).any()


def test_pasted_defects_lie_on_the_product_and_have_its_colors(materials):
    brown = np.mean([pixels[mask].mean(0) for pixels, mask in materials.shots], 0)
    for image, mask in make_drawn("crop-paste", materials, 6, (0, 1)):
        foreground = np.any([one.foreground for one in PIECES], 0)
        assert (mask & foreground).sum() >= 0.8 * mask.sum()
        np.testing.assert_allclose(image[mask].mean(0), brown, atol=30)


def test_perlin_noise_is_zero_at_its_nodes_and_smooth():
    noise = perlin_noise((64, 64), (4, 4), np.random.default_rng(0))
    assert noise.shape == (64, 64) and np.abs(noise).max() < 1.1 and np.abs(noise[15:17, 15:17]).max() < 0.15
    assert np.abs(np.diff(noise, axis=0)).max() < 0.4 and noise.std() > 0.1


def test_arms_by_name_always_have_the_shots_alone():
    assert check_arms(("perlin",), ()) == ("none", "perlin")
    assert check_arms((), ()) == tuple(arm for arm in ARMS if arm != "reweighted")
    assert check_arms((), ("reweighting",)) == ARMS
    with pytest.raises(DitAttnError, match=r"unknown arm 'perlim'.+Did you mean .perlin."):
        check_arms(("perlim",), ())
    with pytest.raises(DitAttnError, match="needs the method 'reweighting', which is not there; leave it out"):
        check_arms(("reweighted",), ())
