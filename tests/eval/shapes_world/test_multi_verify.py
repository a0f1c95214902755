"""The verifier of several objects reads drawings back, object by object, and names what is wrong of which."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from dit_attn.eval.shapes_world import items, multi
from dit_attn.eval.shapes_world.multi import MultiScene, SceneObject
from dit_attn.eval.shapes_world.multi_verify import ObjectVerdict, detail, judge, verify_scene

CIRCLE = SceneObject("circle", "red", "large", "left")
CROSS = SceneObject("cross", "blue", "small", "right")
PAIR = MultiScene((CIRCLE, CROSS), "white")
RIGHT = ObjectVerdict(present=True, color=True, shape=True, size=True, place=True)


def _draw(scene: MultiScene, size: int = 64) -> torch.Tensor:
    return multi.render_scenes([scene], size)[0]


@pytest.mark.parametrize("noise", [0.0, 0.03])
@pytest.mark.parametrize("filled", [0.0, 1.0])
@pytest.mark.parametrize("size", [64, 128])
def test_drawn_scenes_are_read_back(size, filled, noise):
    generator = torch.Generator().manual_seed(size)
    scenes = multi.sample_scenes(30, generator, filled=filled)
    images = multi.render_scenes(scenes, size, generator=generator)
    images = (images + noise * torch.randn(images.shape, generator=generator)).clamp(0, 1)
    found = [judge(image, scene) for image, scene in zip(images, scenes)]
    assert all(one.background and one.count for one in found)
    objects = [one for verdict in found for one in verdict.objects]
    assert not any(one.leak for one in objects)
    for name in ("present", "color", "shape", "size", "place"):
        assert np.mean([getattr(one, name) for one in objects]) >= 0.99, name
    fills = [one.fill for one in objects if one.fill is not None]
    assert bool(fills) == bool(filled) and (not fills or np.mean(fills) >= 0.97)


@pytest.mark.parametrize(
    ("name", "value"),
    [("color", "green"), ("shape", "square"), ("size", "small")],
)
def test_one_wrong_word_of_an_object_is_the_only_one_reported_and_of_that_object(name, value):
    scene = MultiScene((replace(CIRCLE, **{name: value}), CROSS), "white")
    assert judge(_draw(scene), PAIR).objects == (replace(RIGHT, **{name: False}), RIGHT)


def test_an_object_far_from_its_place_is_missing():
    scene = MultiScene((replace(CIRCLE, place="top left"), CROSS), "white")
    assert judge(_draw(scene), PAIR).objects == (ObjectVerdict(), RIGHT)


def test_an_object_beside_its_place_is_present_and_its_place_is_wrong():
    shifted = torch.roll(_draw(PAIR, 128), -18, 1)  # up, by 14 % of the canvas
    assert [(one.present, one.place) for one in judge(shifted, PAIR).objects] == [(True, False)] * 2


def test_swapped_colors_are_leaks_and_a_third_color_is_not():
    swapped = MultiScene((replace(CIRCLE, color="blue"), replace(CROSS, color="red")), "white")
    assert judge(_draw(swapped), PAIR).objects == (replace(RIGHT, color=False, leak=True),) * 2
    third = MultiScene((replace(CIRCLE, color="green"), CROSS), "white")
    assert not judge(_draw(third), PAIR).objects[0].leak


def test_a_missing_object_is_all_wrong_and_the_other_is_not():
    alone = MultiScene((CIRCLE,), "white")
    verdict = judge(_draw(alone), PAIR)
    assert not verdict.count and verdict.objects == (RIGHT, ObjectVerdict())
    assert judge(torch.ones(3, 64, 64), PAIR).objects == (ObjectVerdict(), ObjectVerdict())


def test_an_attribute_of_the_scene_holds_where_it_does_for_every_object():
    other = MultiScene((replace(CIRCLE, color="cyan"), CROSS), "gray")
    found = verify_scene(_draw(other), PAIR)
    assert {name for name, right in found.items() if not right} == {"background", "color"}
    assert items.verify([_draw(PAIR)], PAIR) == dict.fromkeys(found, True) and "fill" not in found


def test_a_wrong_fill_and_a_wrong_period_fail_the_fill_alone():
    filled = MultiScene((replace(CIRCLE, fill="striped"), replace(CROSS, fill="plain")), "white")
    barred = MultiScene((replace(CIRCLE, fill="barred"), replace(CROSS, fill="plain")), "white")
    assert [one.fill for one in judge(_draw(filled, 128), filled).objects] == [True, True]
    assert [one.fill for one in judge(_draw(barred, 128), filled).objects] == [False, True]
    enlarged = torch.nn.functional.interpolate(_draw(filled, 128)[None], scale_factor=2, mode="bicubic")[0]
    verdict = verify_scene(enlarged, filled)
    assert {name for name, right in verdict.items() if not right} == {"fill"}


def test_detail_is_there_in_a_drawing_and_not_in_an_enlarged_one() -> None:
    striped = replace(CIRCLE, fill="striped", size="large")
    scene = MultiScene((striped,), "white")
    drawn = multi.render_scenes([scene], 128)
    assert detail(drawn[0], scene) == 1.0
    enlarged = torch.nn.functional.interpolate(multi.render_scenes([scene], 64), (128, 128), mode="bilinear")
    assert detail(enlarged[0].clamp(0, 1), scene) == 0.0
    plain = MultiScene((replace(striped, fill="plain"),), "white")
    assert detail(drawn[0], plain) is None and detail(drawn[0], MultiScene((CIRCLE,), "white")) is None
