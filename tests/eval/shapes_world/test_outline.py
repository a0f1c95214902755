"""Outlines: 1 for drawings, the known ratio and width for drawings made rough or soft on purpose."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import ndimage

from dit_attn.eval.shapes_world import world
from dit_attn.eval.shapes_world.outline import contour_length, mean_outline, measure_outlines

CIRCLE = world.Scene("circle", "red", "large", "center", 1, "white")
SQUARE = world.Scene("square", "blue", "large", "center", 1, "gray")


def _draw(scene: world.Scene, size: int) -> np.ndarray:
    return world.render_scenes([scene], size)[0].permute(1, 2, 0).numpy()


def _blocks(image: np.ndarray, block: int) -> np.ndarray:
    """The image on a grid of `block` pixels: its outline becomes a staircase."""
    return image[block // 2 :: block, block // 2 :: block].repeat(block, 0).repeat(block, 1)


@pytest.mark.parametrize("size", [48, 64, 128, 256])
def test_drawn_images_have_the_outline_of_a_drawing(size):
    generator = torch.Generator().manual_seed(size)
    scenes = [world.all_scenes()[i] for i in torch.randperm(1152, generator=generator)[: 768 // size].tolist()]
    images = world.render_scenes(scenes, size, generator=generator)
    for scene, image in zip(scenes, images):
        found = measure_outlines(image)
        assert len(found) == scene.count
        for one in found:
            assert one.shape == scene.shape
            assert one.perimeter == pytest.approx(1.0, abs=0.01) and one.edge_width == pytest.approx(1.0, abs=0.05)


def test_a_canvas_that_is_not_square_is_measured_the_same_way():
    scenes = [world.all_scenes()[i] for i in (5, 400, 800, 1100)]
    for image in world.render_scenes(scenes, 64, 96, generator=torch.Generator().manual_seed(2)):
        for one in measure_outlines(image):
            assert one.perimeter == pytest.approx(1.0, abs=0.02) and one.edge_width == pytest.approx(1.0, abs=0.1)


def test_a_staircase_of_four_pixels_is_as_much_longer_as_its_steps():
    """Of a circle, the steps of a grid measure 8 r instead of 2 pi r."""
    (one,) = measure_outlines(_blocks(_draw(CIRCLE, 128), 4))
    assert one.perimeter == pytest.approx(4 / math.pi, abs=0.05)


def test_a_staircase_along_the_grid_is_no_rougher():
    (one,) = measure_outlines(_blocks(_draw(SQUARE, 128), 4))
    assert one.perimeter == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("size", [128, 256])
@pytest.mark.parametrize("width", [3, 5])
def test_edge_width_is_that_of_the_blur_and_blur_is_not_roughness(size, width):
    image = ndimage.uniform_filter(_draw(SQUARE, size), (width, width, 0))
    (one,) = measure_outlines(image)
    assert one.edge_width == pytest.approx(width, rel=0.12)
    assert one.perimeter == pytest.approx(1.0, abs=0.02)


def test_noise_is_neither_roughness_nor_blur():
    noise = 0.02 * np.random.default_rng(0).standard_normal((128, 128, 3))
    (one,) = measure_outlines((_draw(CIRCLE, 128) + noise).clip(0, 1))
    assert one.perimeter == pytest.approx(1.0, abs=0.02) and one.edge_width == pytest.approx(1.0, abs=0.25)


def test_a_video_is_measured_over_all_its_frames_and_an_empty_one_has_no_figure():
    video = world.VideoScene("triangle", "green", "large", "right", "slow", "black")
    frames = world.render_videos([video], 3, 96)[0].permute(1, 0, 2, 3)
    rough = torch.stack([frames[0], torch.from_numpy(_blocks(frames[1].permute(1, 2, 0).numpy(), 4)).permute(2, 0, 1)])
    assert mean_outline(frames)["perimeter"] == pytest.approx(1.0, abs=0.01)
    assert mean_outline(rough)["perimeter"] > 1.05
    assert mean_outline([torch.ones(3, 32, 32)]) == {"perimeter": None, "edge-width": None}


@pytest.mark.parametrize(
    ("rows", "length"),
    [
        (["...", ".#.", "..."], 4 * math.hypot(0.5, 0.5)),
        (["##", "##"], 4 + 4 * math.hypot(0.5, 0.5)),
        (["#.", ".#"], 8 * math.hypot(0.5, 0.5)),
        (["..", ".."], 0.0),
    ],
)
def test_length_of_contours_that_can_be_counted(rows, length):
    field = np.array([[cell == "#" for cell in row] for row in rows], dtype=float)
    assert contour_length(field) == pytest.approx(length)
