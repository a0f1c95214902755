"""The segmenter learns, arms share what they can, scores are those of definitions, traces of a model are found."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage

from dit_attn.pipelines.anomaly.benchmark.scores import image_scores, per_region_overlap, score_maps
from dit_attn.pipelines.anomaly.benchmark.segmenter import Data, SegmenterConfig, UNet, fit, predict, resized_masks
from dit_attn.pipelines.anomaly.benchmark.traces import Traces

CONFIG = SegmenterConfig(size=32, width=8, steps=40, batch=8)


def _normal(rng):
    return rng.integers(90, 160, (32, 32, 3)).astype(np.uint8)


def _mask(rng):
    mask = np.zeros((32, 32), bool)
    top, left = rng.integers(2, 20, 2)
    mask[top : top + 9, left : left + 9] = True
    return mask


def _treated(pixels, mask):
    """What a lossy autoencoder leaves inside a mask: the mean colors, without the noise."""
    blurred = ndimage.gaussian_filter(pixels.astype(float), (2, 2, 0))
    return np.where(mask[..., None], blurred, pixels).astype(np.uint8)


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    normals = [_normal(rng) for _ in range(12)]
    masks = [_mask(rng) for _ in range(12)]
    holes = [(np.where(m[..., None], 30, n).astype(np.uint8), m) for n, m in zip(normals, masks)]
    return normals, masks, holes


def _traces(normals, masks):
    to = lambda found: torch.stack([torch.from_numpy(x).permute(2, 0, 1) / 255 for x in found])  # noqa: E731
    done = {"untouched": normals, "decoded": [_treated(n, m) for n, m in zip(normals, masks)]}
    return Traces(resized_masks(masks, 32), {name: to(found) for name, found in done.items()})


def test_the_control_finds_a_segmenter_that_learned_the_traces_and_clears_one_that_did_not(images):
    normals, masks, holes = images
    shortcut = [(_treated(n, m), m) for n, m in zip(normals, masks)]
    traces = _traces(normals[6:], masks[6:])
    learned = fit(Data(normals[:6], holes[:1], shortcut[:6], CONFIG), CONFIG, 0)
    honest = fit(Data(normals[:6], holes[:1], holes[1:6], CONFIG), CONFIG, 0)
    found, clear = traces.score(learned), traces.score(honest)
    assert found["decoded"] > 0.9 > 0.75 > found["untouched"] > 0.25
    assert clear["decoded"] < 0.75
    tests = torch.cat([_traces([h[0] for h in holes[6:]], masks[6:]).images["untouched"], traces.images["untouched"]])
    truth = torch.cat([traces.masks[:, 0] > 0, torch.zeros(6, 32, 32, dtype=torch.bool)])
    scores = score_maps(predict(honest, tests), truth)
    assert scores["pixel_ap"] > 0.9 and scores["image_auroc"] == 1.0 and scores["pro"] > 0.8


def test_arms_share_normal_images_flips_and_first_weights(images):
    normals, _, holes = images
    plain, with_made = Data(normals, holes[:2], [], CONFIG), Data(normals, holes[:2], holes[2:4], CONFIG)
    a, b = (data.batch(np.random.default_rng(3)) for data in (plain, with_made))
    assert torch.equal(a[0][:4], b[0][:4]) and not a[1][:4].any()
    assert a[1][4:].flatten(1).any(1).all() and b[1][4:].flatten(1).any(1).all()
    none = SegmenterConfig(size=32, width=8, steps=0)
    first = [fit(data, none, 5).state_dict() for data in (plain, with_made)]
    assert all(torch.equal(value, first[1][name]) for name, value in first[0].items())


def test_a_map_depends_on_no_other_image():
    torch.manual_seed(0)
    model, images = UNet(8).eval(), torch.rand(3, 3, 32, 48)
    torch.testing.assert_close(predict(model, images)[1:2], predict(model, images[1:2]), atol=1e-6, rtol=0)


def test_overlap_by_region_is_its_definition():
    rng = np.random.default_rng(0)
    masks = np.zeros((2, 16, 16), bool)
    masks[0, 2:5, 2:5] = masks[0, 9:12, 3:14] = masks[1, 6:8, 6:8] = True
    maps = rng.uniform(size=masks.shape) + 0.3 * masks
    regions = [ndimage.label(mask)[0] for mask in masks]
    points = []
    for limit in np.unique(maps):
        covered = [(maps[i][r == n] > limit).mean() for i, r in enumerate(regions) for n in range(1, r.max() + 1)]
        points.append(((maps[~masks] > limit).mean(), np.mean(covered)))
    rate, overlap = np.array([(0.0, 0.0), *points[::-1]]).T
    grid = np.linspace(0, 0.3, 3001)
    expected = np.interp(grid, rate, overlap).mean()
    assert per_region_overlap(maps, masks) == pytest.approx(expected, abs=0.01)
    assert per_region_overlap(masks.astype(float), masks) == pytest.approx(1.0)
    assert per_region_overlap(np.zeros(masks.shape), masks) == pytest.approx(0.15)  # the diagonal


def test_pixel_scores_are_those_of_brute_force():
    rng = np.random.default_rng(1)
    masks = torch.from_numpy(rng.uniform(size=(4, 8, 8)) < 0.2)
    masks[2:] = False
    maps = torch.from_numpy(rng.uniform(size=(4, 8, 8)) * 0.7) + 0.2 * masks
    found = score_maps(maps, masks)
    inside, outside = maps[masks], maps[~masks]
    assert found["pixel_auroc"] == pytest.approx(float((inside[:, None] > outside[None]).double().mean()), abs=1e-5)
    order = masks.flatten()[maps.flatten().argsort(descending=True)].double()
    precision = order.cumsum(0) / torch.arange(1, len(order) + 1)
    assert found["pixel_ap"] == pytest.approx(float((precision * order).sum() / order.sum()), abs=1e-5)
    high = image_scores(maps)
    assert found["image_auroc"] == pytest.approx(float((high[:2, None] > high[None, 2:]).double().mean()))
