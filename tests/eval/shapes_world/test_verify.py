"""The verifiers read ground truth back, also through noise and blur, and notice what is wrong."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import ndimage

from dit_attn.errors import DitAttnError
from dit_attn.eval.shapes_world import verify, world
from dit_attn.eval.shapes_world.verify import verify_image, verify_video


def _degrade(pixels: torch.Tensor, how: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    if how in ("blur", "both"):
        sigma = (0,) * (pixels.ndim - 2) + (pixels.shape[-1] / 96,) * 2
        pixels = torch.from_numpy(ndimage.gaussian_filter(pixels.numpy(), sigma))
    if how in ("noise", "both"):
        pixels = (pixels + 0.08 * torch.randn(pixels.shape, generator=generator)).clamp(0, 1)
    return pixels


def _accuracy(verdicts: list[dict[str, bool]]) -> dict[str, float]:
    return {name: float(np.mean([v[name] for v in verdicts])) for name in verdicts[0]}


@pytest.mark.parametrize("how", ["clean", "noise", "blur", "both"])
@pytest.mark.parametrize("size", [64, 128])
def test_ground_truth_images_are_read_back(size, how):
    generator = torch.Generator().manual_seed(size)
    order = torch.randperm(len(world.all_scenes()), generator=generator)[:120].tolist()
    scenes = [world.all_scenes()[i] for i in order]
    images = _degrade(world.render_scenes(scenes, size, generator=generator), how)
    accuracy = _accuracy([verify_image(image, scene) for image, scene in zip(images, scenes)])
    assert min(accuracy.values()) >= 0.99, accuracy


@pytest.mark.parametrize("how", ["clean", "noise", "blur", "both"])
def test_ground_truth_videos_are_read_back(how):
    generator = torch.Generator().manual_seed(3)
    order = torch.randperm(len(world.all_videos()), generator=generator)[:100].tolist()
    scenes = [world.all_videos()[i] for i in order]
    frames = _degrade(world.render_videos(scenes, 9, 48, generator=generator), how)
    accuracy = _accuracy([verify_video(video, scene) for video, scene in zip(frames, scenes)])
    assert min(accuracy.values()) >= 0.99, accuracy


SCENE = world.Scene("circle", "red", "large", "left", 1, "white")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("shape", "square"),
        ("color", "purple"),
        ("size", "small"),
        ("place", "center"),
        ("background", "gray"),
    ],
)
def test_one_wrong_attribute_of_an_image_is_the_only_one_reported(field, value):
    image = world.render_scenes([replace(SCENE, **{field: value})], 128)[0]
    wrong = {name for name, right in verify_image(image, SCENE).items() if not right}
    assert wrong == {field}


def test_a_missing_object_fails_everything_but_the_background():
    empty = torch.ones(3, 64, 64)
    verdict = verify_image(empty, SCENE)
    assert verdict.pop("background")
    assert not any(verdict.values())


def test_wrong_count_is_reported():
    pair = world.Scene("circle", "red", "small", "row", 2, "white")
    trio = replace(pair, count=3)
    assert not verify_image(world.render_scenes([trio], 128)[0], pair)["count"]


VIDEO = world.VideoScene("square", "blue", "large", "right", "fast", "black")


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ({"direction": "left"}, {"direction"}),
        ({"direction": "up"}, {"direction"}),
        ({"speed": "slow"}, {"speed"}),
        ({"direction": "still", "speed": "still"}, {"direction", "speed"}),
        ({"color": "cyan"}, {"color"}),
        ({"shape": "triangle"}, {"shape"}),
    ],
)
def test_one_wrong_attribute_of_a_video_is_reported(change, wrong):
    frames = world.render_videos([replace(VIDEO, **change)], 9, 48)[0]
    assert {name for name, right in verify_video(frames, VIDEO).items() if not right} == wrong


def test_all_image_types_give_the_same_verdict():
    from PIL import Image

    tensor = world.render_scenes([SCENE], 64)[0]
    array = tensor.permute(1, 2, 0).numpy()
    image = Image.fromarray((array * 255).round().astype(np.uint8))
    assert verify_image(tensor, SCENE) == verify_image(array, SCENE) == verify_image(image, SCENE)


def test_something_that_is_no_image_is_refused():
    with pytest.raises(DitAttnError, match="must be"):
        verify_image(np.zeros((8, 8)), SCENE)


def test_matching_in_a_window_is_matching_on_the_full_canvas(monkeypatch):
    """Rough, blurred and touching objects, at the border too, get the same description to the last bit."""
    generator = torch.Generator().manual_seed(4)
    scenes = [world.all_scenes()[i] for i in torch.randperm(1152, generator=generator)[:10].tolist()]
    images = _degrade(world.render_scenes(scenes, 48, 72, generator=generator), "both")
    images = torch.cat([images, images.roll(24, 3), images.roll(14, 2)])
    near = [verify.detect_objects(image) for image in images]
    monkeypatch.setattr(verify, "window_around", lambda *args, **options: (slice(None), slice(None)))
    assert near == [verify.detect_objects(image) for image in images]
    assert sum(map(len, near)) > 30
