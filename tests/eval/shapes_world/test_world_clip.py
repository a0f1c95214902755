"""The offline judge: its scores fall as images and captions get worse, and know their own noise floor."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("torchmetrics")

from dit_attn.eval.metrics import score
from dit_attn.eval.shapes_world import world

N = 160


def drawn(seed: int, count: int = N, kind: str = "any") -> tuple[torch.Tensor, list[str]]:
    """uint8 images of random scenes, and their captions."""
    rng = torch.Generator().manual_seed(seed)
    scenes = world.sample_scenes(count, rng)
    if kind == "collapsed":
        scenes = scenes[:4] * (count // 4)
    images = world.render_scenes(scenes, 64, generator=rng)
    return (images * 255).round().to(torch.uint8), [world.caption(scene) for scene in scenes]


def blurred(images: torch.Tensor, times: int) -> torch.Tensor:
    x = images.float()
    for _ in range(times):
        x = torch.nn.functional.avg_pool2d(torch.nn.functional.pad(x, (2, 2, 2, 2), mode="replicate"), 5, 1)
    return x.round().to(torch.uint8)


def noisy(images: torch.Tensor, sigma: float) -> torch.Tensor:
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(9)) * sigma * 255
    return (images + noise).clamp(0, 255).round().to(torch.uint8)


@pytest.fixture(scope="module")
def real() -> torch.Tensor:
    return drawn(1)[0]


@pytest.mark.parametrize("metric", ("fid-world", "kid-world"))
def test_distances_grow_with_every_kind_of_damage(metric: str, real: torch.Tensor) -> None:
    other = drawn(2)[0]
    floor = score(metric, other, real)
    assert floor.label == f"{metric} (world-clip)" and floor.better == "lower"
    for damage in ([blurred(other, t) for t in (1, 3, 8)], [noisy(other, s) for s in (0.1, 0.25, 0.5)]):
        values = [score(metric, images, real).value for images in damage]
        assert values == sorted(values) and values[0] > floor.value
    assert score(metric, drawn(3, kind="collapsed")[0], real).value > 3 * abs(floor.value)


def test_two_halves_of_the_real_ones_are_near_the_noise_floor() -> None:
    many = [drawn(seed, 400)[0] for seed in (4, 5, 6, 7)]
    halves = [score("fid-world", other, many[0]).value for other in many[1:]]
    assert max(halves) < 1.5 * min(halves)
    assert max(halves) < 0.2 * score("fid-world", noisy(many[1], 0.25), many[0]).value


def test_captions_are_judged_attribute_by_attribute() -> None:
    images, captions = drawn(7)
    right = score("clip-world", images, captions=captions).value
    wrong = {
        "color": [swap(text, ("red", "green", "blue", "yellow", "purple", "cyan")) for text in captions],
        "background": [swap(text, ("white", "gray", "black")) for text in captions],
        "size": [swap(text, ("small", "large")) for text in captions],
        "everything": captions[1:] + captions[:1],
    }
    scores = {name: score("clip-world", images, captions=texts).value for name, texts in wrong.items()}
    assert all(value < right - 5 for value in scores.values()), (right, scores)
    assert scores["everything"] == min(scores.values())
    worse = [score("clip-world", noisy(images, sigma), captions=captions).value for sigma in (0.2, 0.4, 0.8)]
    assert [right, *worse] == sorted([right, *worse], reverse=True)


def swap(text: str, words: tuple[str, ...]) -> str:
    """Every one of ``words`` in a text replaced by the next one."""
    return " ".join(words[(words.index(w) + 1) % len(words)] if w in words else w for w in text.split())
