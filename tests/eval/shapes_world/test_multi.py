"""Scenes of different objects: captions invert, objects keep apart, the split holds in any order of the objects."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import combinations, permutations

import pytest
import torch

from dit_attn.errors import DitAttnError
from dit_attn.eval.shapes_world import items, multi, world
from dit_attn.eval.shapes_world.multi import MultiScene, SceneObject
from dit_attn.eval.shapes_world.verify import segment

PAIR = multi.parse(multi.EXAMPLE)


def _scenes(count: int, filled: float = 0.5) -> list[MultiScene]:
    return multi.sample_scenes(count, torch.Generator().manual_seed(0), filled=filled)


def test_every_caption_parses_back_to_its_scene():
    for scene in [*_scenes(200), *multi.held_out_sample(50)]:
        assert multi.parse(multi.caption(scene)) == scene
        assert len(scene.objects) == 1 or items.parse(multi.caption(scene)) == scene


def test_a_caption_is_what_a_person_would_write():
    first, second = PAIR.objects
    assert first == SceneObject("circle", "red", "large", "left") and second.place == "right"
    assert multi.caption(PAIR) == multi.EXAMPLE
    assert multi.parse("A large red circle at the left, a small blue cross at the right on white") == PAIR
    filled = multi.parse("a large striped red circle at the top left and a small plain blue cross at the right on gray")
    assert [one.fill for one in filled.objects] == ["striped", "plain"] and filled.filled


def test_captions_fit_the_text_length_and_have_known_words():
    scenes = _scenes(400)
    words = [multi.caption(scene).split() for scene in scenes]
    assert max(map(len, words)) + 1 <= multi.TEXT_LENGTH
    assert {word for text in words for word in text} == set(multi.vocabulary())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a large red circle at the left and a small red cross at the right on white", "have the color red"),
        ("a large red cross at the left and a small blue cross at the right on white", "have the shape cross"),
        ("a large red circle at the left and a small blue cross at the top on white", "left and at the top overlap"),
        ("a small striped red circle at the left on white", "a small object cannot be striped"),
        ("a large red blob at the left and a small blue cross at the top on white", "is not a caption"),
    ],
)
def test_objects_that_do_not_fit_together_are_refused_in_one_line(text, message):
    for parse in (multi.parse, items.parse):
        with pytest.raises(DitAttnError, match=message) as error:
            parse(text)
        assert "\n" not in str(error.value)


def test_the_older_worlds_captions_mean_what_they_did():
    for item in (*world.all_scenes()[::97], *world.all_videos()[::97]):
        assert items.parse(world.caption(item)) == item and items.caption(item) == world.caption(item)


def test_objects_of_a_scene_share_nothing_and_numbers_are_even():
    scenes = _scenes(400, filled=0.0)
    for scene in scenes:
        for a, b in combinations(scene.objects, 2):
            assert a.color != b.color and a.shape != b.shape and a.place != b.place
    assert min(Counter(len(scene.objects) for scene in scenes).values()) > 70
    assert {one.place for scene in scenes for one in scene.objects} == set(multi.PLACES)
    two = multi.sample_scenes(40, torch.Generator().manual_seed(1), objects=(2, 2))
    assert {len(scene.objects) for scene in two} == {2}


def test_the_split_does_not_depend_on_the_order_of_the_objects():
    for scene in [*_scenes(40), *multi.held_out_sample(40)]:
        orders = [replace(scene, objects=order) for order in permutations(scene.objects)]
        assert len({multi.held_out(one) for one in orders}) == 1


def test_training_draws_are_seeded_and_never_held_out_and_the_sample_is_different_captions():
    assert _scenes(100) == _scenes(100)
    assert not any(multi.held_out(scene) for scene in _scenes(100))
    kept = multi.held_out_sample(120, seed=3)
    assert all(map(multi.held_out, kept)) and len({multi.caption(scene) for scene in kept}) == 120
    assert Counter(len(scene.objects) for scene in kept) == {1: 30, 2: 30, 3: 30, 4: 30}
    assert 20 < sum(map(multi.never_seen, kept)) < 115


def test_more_held_out_captions_than_there_are_is_refused(monkeypatch):
    monkeypatch.setattr(multi, "TRIES", 2)
    with pytest.raises(DitAttnError, match="600 different held-out captions of 1 to 1 objects were not found"):
        multi.held_out_sample(600, objects=(1, 1))


@pytest.mark.parametrize("size", [64, 128])
def test_objects_never_touch_each_other_or_the_border(size):
    generator = torch.Generator().manual_seed(size)
    sets = multi.place_sets()[4]
    shapes = ["square", "cross", "circle", "triangle"]
    large = [SceneObject(s, c, "large", p) for s, c, p in zip(shapes, world.COLORS, sets[0])]
    scenes = [MultiScene(tuple(large), background) for background in world.BACKGROUNDS] * 4
    for image in multi.render_scenes(scenes, size, generator=generator):
        assert len(segment(image.permute(1, 2, 0).numpy())) == 4
        assert all(float((edge - edge[:, :1]).abs().max()) == 0 for edge in (image[:, 0], image[:, -1], image[..., 0]))


def test_a_scene_of_one_object_is_drawn_as_in_the_older_world():
    """But for the place of its center and the size of a large one."""
    one = MultiScene((SceneObject("triangle", "green", "small", "center"),), "gray")
    old = world.Scene("triangle", "green", "small", "center", 1, "gray")
    assert torch.allclose(multi.render_scenes([one], 96), world.render_scenes([old], 96), atol=1e-6)


def test_same_seed_draws_the_same_pixels_and_another_seed_moves_objects_and_fills():
    scenes = _scenes(8)
    first, again, other = (
        multi.render_scenes(scenes, 64, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
