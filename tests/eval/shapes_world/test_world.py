"""The world: captions invert, the split keeps its promises, drawing is exact and deterministic."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from dit_attn.errors import DitAttnError
from dit_attn.eval.shapes_world import world

EVERYTHING = (*world.all_scenes(), *world.all_videos())
DIGEST = "4654dc22614efec1a4fd03862e84856e0fdf28e9bad24273f7cca76ce4d78838"


def test_every_caption_parses_back_to_its_item():
    assert all(world.parse(world.caption(item)) == item for item in EVERYTHING)


def test_captions_are_unique():
    assert len({world.caption(item) for item in EVERYTHING}) == len(EVERYTHING)


def test_captions_fit_the_text_length_with_end_token():
    assert max(len(world.caption(item).split()) for item in EVERYTHING) + 1 <= 16


def test_a_foreign_sentence_is_refused_in_one_line_with_an_example():
    with pytest.raises(DitAttnError, match="a large red circle") as error:
        world.parse("a cat on a mat")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["image", "video"])
def test_split_is_a_partition_and_training_never_sees_the_kept_pairs(kind):
    training, held_out = world.split(kind)
    assert not set(training) & set(held_out)
    assert len(held_out) >= 200
    assert not any(world.never_seen(item) for item in training)
    assert {(i.color, i.shape) for i in held_out if world.never_seen(i)} == set(world.NEVER_SEEN)


@pytest.mark.parametrize("kind", ["image", "video"])
def test_sample_of_held_out_items_mixes_seen_and_never_seen_pairs(kind):
    items = world.held_out_sample(kind, 200)
    unseen = sum(world.never_seen(item) for item in items)
    assert len(set(items)) == 200
    assert 40 <= unseen <= 160


@pytest.mark.parametrize("kind", ["image", "video"])
def test_a_sample_of_more_than_there_are_is_refused(kind):
    count = len(world.split(kind)[1])
    assert len(world.held_out_sample(kind, count)) == count
    with pytest.raises(DitAttnError, match=f"has {count} held-out {kind} captions, {count + 1} were requested"):
        world.held_out_sample(kind, count + 1)


def test_training_draws_are_seeded_and_never_held_out():
    draws = [
        (world.sample_scenes(64, g), world.sample_videos(64, g))
        for g in (torch.Generator().manual_seed(1), torch.Generator().manual_seed(1))
    ]
    assert draws[0] == draws[1]
    assert not any(world.held_out(item) for item in (*draws[0][0], *draws[0][1]))


def test_single_draws_one_object_scenes_only():
    scenes = world.sample_scenes(64, torch.Generator().manual_seed(0), single=True)
    assert all(scene.count == 1 for scene in scenes)


def test_same_seed_draws_the_same_pixels_and_another_seed_moves_them():
    scenes = list(world.all_scenes()[:8])
    first, again, other = (
        world.render_scenes(scenes, 32, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_area_of_a_drawn_circle_is_the_area_of_the_circle():
    scene = world.Scene("circle", "red", "large", "center", 1, "black")
    image = world.render_scenes([scene], 128)[0]
    share = (image[0] / world.COLORS["red"][0]).mean()
    assert float(share) == pytest.approx(torch.pi * world.SIZES["large"] ** 2, rel=0.01)


def test_a_scene_drawn_small_is_the_large_one_averaged():
    scenes = [s for s in world.all_scenes() if s.count == 1][::37]
    small = world.render_scenes(scenes, 32)
    pooled = torch.nn.functional.avg_pool2d(world.render_scenes(scenes, 256), 8)
    assert float((small - pooled).abs().mean()) < 0.005


def test_height_and_width_may_differ():
    assert world.render_scenes(list(world.all_scenes()[:2]), 40, 64).shape == (2, 3, 40, 64)


def test_first_frames_of_a_video_are_those_of_the_full_video():
    scenes = list(world.all_videos()[::211])
    full = world.render_videos(scenes, 9, 48)
    assert torch.equal(world.render_videos(scenes, 9, 48, first=4), full[:, :, :4])


def test_a_still_video_does_not_change_and_a_moving_one_does():
    still = world.VideoScene("cross", "red", "small", "still", "still", "white")
    moving = world.VideoScene("cross", "red", "small", "up", "slow", "white")
    frames = world.render_videos([still, moving], 9, 48)
    assert torch.equal(frames[0, :, 0], frames[0, :, -1])
    assert not torch.equal(frames[1, :, 0], frames[1, :, -1])


def test_coverage_of_a_window_is_that_part_of_the_full_canvas():
    shape = torch.arange(4)
    center, extent = torch.tensor([[0.2, 0.3], [0.5, 0.5], [0.9, 0.4], [0.6, 0.95]]), torch.full((4,), 0.21)
    full = world.coverage(shape, center, extent, 48, 80)
    window = (slice(5, 30), slice(20, 71))
    assert torch.equal(world.coverage(shape, center, extent, 48, 80, window), full[:, 5:30, 20:71])


def test_captions_and_their_split_are_those_that_the_shipped_models_were_trained_on():
    text = "\n".join(f"{world.caption(item)} {world.held_out(item)}" for item in EVERYTHING)
    assert hashlib.sha256(text.encode()).hexdigest() == DIGEST


def test_drawings_are_those_of_the_formula():
    """In float64: 1 inside, 0 outside, and the signed distance over one pixel between."""
    scenes = [scene for scene in world.all_scenes() if scene.count == 1][::53]
    y, x = (np.mgrid[:64, :64] + 0.5) / 64
    for scene, image in zip(scenes, world.render_scenes(scenes, 64)):
        r, arm = world.SIZES[scene.size], world.SIZES[scene.size] / 3
        dx, dy = x - world.PLACES[scene.place][0], y - world.PLACES[scene.place][1]
        ax, ay = abs(dx), abs(dy)
        distance = {
            "circle": np.hypot(dx, dy) - r,
            "square": np.maximum(ax, ay) - r,
            "triangle": np.maximum(dy - r, (2 * ax - dy - r) / 5**0.5),
            "cross": np.minimum(np.maximum(ax - r, ay - arm), np.maximum(ax - arm, ay - r)),
        }[scene.shape]
        share = np.clip(0.5 - 64 * distance, 0, 1)[..., None]
        color, ground = np.array(world.COLORS[scene.color]), np.array(world.BACKGROUNDS[scene.background])
        wanted = share * color + (1 - share) * ground
        assert np.abs(image.permute(1, 2, 0).numpy() - wanted).max() < 1e-4
