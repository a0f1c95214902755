"""Verifier of scenes of several objects: for each object whether it is there, and which of its words are right.

Objects are found as in ``shapes_world.verify`` and assigned to those of the caption by place, then shape, each once.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from dit_attn.eval.shapes_world.fills import read_fill
from dit_attn.eval.shapes_world.multi import PLACES, SIZES, MultiScene, SceneObject
from dit_attn.eval.shapes_world.verify import (
    MIN_OVERLAP,
    PLACE_RADIUS,
    DetectedObject,
    as_array,
    background_of,
    nearest_color,
    segment,
)

FOUND_RADIUS = 0.2  # of the canvas: farther from its place, an object is missing
OTHER_SHAPE = 0.1  # of the canvas: a wrong shape counts as much as this distance when objects are assigned


@dataclass(frozen=True)
class ObjectVerdict:
    """What is right about one object of the caption; all false where it is missing.

    Attributes:
        present: something is near its place.
        color, shape, size, place: that word is right.
        leak: it has the color of another object of the caption.
        fill: the fill is right, and its period where it has one; ``None`` without a fill word.
    """

    present: bool = False
    color: bool = False
    shape: bool = False
    size: bool = False
    place: bool = False
    leak: bool = False
    fill: bool | None = None


@dataclass(frozen=True)
class SceneVerdict:
    """Verdict of an image: its background, the number of objects, and each object of the caption in its order."""

    background: bool
    count: bool
    objects: tuple[ObjectVerdict, ...]

    def attributes(self) -> dict[str, bool]:
        """Return what is right of the full scene: an attribute of the objects where it is so of all."""
        names = [field.name for field in fields(ObjectVerdict) if field.name != "leak"]
        values = {name: [getattr(one, name) for one in self.objects] for name in names}
        common = {name: all(found) for name, found in values.items() if None not in found}
        return {"background": self.background, "count": self.count, **common}


def judge(image: Any, scene: MultiScene) -> SceneVerdict:
    """Check every object of `scene`, the background and the number of objects.

    Args:
        image: PIL image, (H, W, 3) array or (3, H, W) tensor in [0, 1].
        scene: what the prompt says.

    Raises:
        DitAttnError: no image.
    """
    pixels = as_array(image)
    found = segment(pixels)
    owners = assign([one for one, _ in found], scene)
    verdicts = tuple(
        ObjectVerdict(fill=False if one.fill else None) if at is None else judge_object(pixels, *found[at], one, scene)
        for one, at in zip(scene.objects, owners, strict=True)
    )
    return SceneVerdict(background_of(pixels) == scene.background, len(found) == len(scene.objects), verdicts)


def verify_scene(image: Any, scene: MultiScene) -> dict[str, bool]:
    """Check which attributes of `scene` the image shows; those of objects count where they are right for all.

    Args:
        image: as for :func:`judge`.
        scene: what the prompt says.
    """
    return judge(image, scene).attributes()


def detail(image: Any, scene: MultiScene) -> float | None:
    """Return the share of the scene's textured objects whose fill and period are right; ``None`` where none is.

    A period of 8 pixels at every size of the canvas is detail that an enlarged image does not have.

    Args:
        image: as for :func:`judge`.
        scene: what the prompt says.
    """
    verdicts = judge(image, scene).objects if scene.filled else ()
    found = [bool(v.fill) for v, one in zip(verdicts, scene.objects) if one.fill not in ("", "plain")]
    return sum(found) / len(found) if found else None


def assign(found: list[DetectedObject], scene: MultiScene) -> list[int | None]:
    """For each object of the scene the index of the one found, with the least distance in sum (Hungarian method)."""
    from scipy.optimize import linear_sum_assignment

    if not found:
        return [None] * len(scene.objects)
    far = 1e3
    costs = np.full((len(scene.objects), len(found)), far)
    for i, one in enumerate(scene.objects):
        x, y = PLACES[one.place]
        for k, other in enumerate(found):
            distance = float(np.hypot(other.x - x, other.y - y))
            if distance <= FOUND_RADIUS:
                costs[i, k] = distance + OTHER_SHAPE * (other.shape != one.shape)
    chosen: list[int | None] = [None] * len(scene.objects)
    for i, k in zip(*linear_sum_assignment(costs)):
        chosen[i] = int(k) if costs[i, k] < far else None
    return chosen


def judge_object(
    pixels: np.ndarray, found: DetectedObject, region: np.ndarray, wanted: SceneObject, scene: MultiScene
) -> ObjectVerdict:
    """Check the words of ``wanted``, an object of ``scene``, on an object found and its region (H, W) bool."""
    core = _core(region)
    color = _color(pixels, core)
    distances = {name: float(np.hypot(found.x - x, found.y - y)) for name, (x, y) in PLACES.items()}
    size = min(SIZES, key=lambda name: abs(SIZES[name] - found.extent))
    fill = read_fill(pixels, core) if wanted.fill else None
    return ObjectVerdict(
        present=True,
        color=color == wanted.color,
        shape=found.shape == wanted.shape and found.overlap >= MIN_OVERLAP,
        size=size == wanted.size,
        place=min(distances, key=distances.__getitem__) == wanted.place and distances[wanted.place] <= PLACE_RADIUS,
        leak=color != wanted.color and color in {one.color for one in scene.objects},
        fill=None if fill is None else fill.kind == wanted.fill and fill.period_is_right,
    )


def _core(region: np.ndarray) -> np.ndarray:
    """The inside of a region, without the pixels that mix with the background."""
    from scipy import ndimage

    core = ndimage.binary_erosion(region, iterations=max(1, round(min(region.shape) / 48)))
    return core if core.any() else region


def _color(pixels: np.ndarray, core: np.ndarray) -> str:
    """Name of the color: of the brighter half of the pixels, since a fill darkens some."""
    inside = pixels[core]
    bright = inside.sum(-1)
    return nearest_color(np.median(inside[bright >= np.median(bright)], axis=0))
