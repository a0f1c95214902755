"""Scenes of one to four different objects: each has its own color, shape, size and place, and may have a fill.

    scene = parse("a large red circle at the left and a small blue cross at the right on white")
    caption(scene)                       # the same sentence
    image = render_scenes([scene], 128)  # (1, 3, 128, 128) in [0, 1]

No two objects share a color or a shape, so that a word of the caption belongs to one object, and none overlap.
Coordinates are fractions of the canvas, as in ``shapes_world.world``.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations

import torch

from dit_attn.errors import DitAttnError
from dit_attn.eval.shapes_world.fills import FILLS, shade
from dit_attn.eval.shapes_world.world import BACKGROUNDS, COLORS, JITTER, NEVER_SEEN, SHAPES, coverage

SIZES = {"small": 0.13, "large": 0.19}  # half of the extent
PLACES: dict[str, tuple[float, float]] = {
    "top left": (0.25, 0.25),
    "top": (0.5, 0.25),
    "top right": (0.75, 0.25),
    "left": (0.25, 0.5),
    "center": (0.5, 0.5),
    "right": (0.75, 0.5),
    "bottom left": (0.25, 0.75),
    "bottom": (0.5, 0.75),
    "bottom right": (0.75, 0.75),
}
APART = 0.5  # of the centers, along x or y: two large objects keep a gap, jitter or not
MOST = 4
MOST_FILLED = 3  # objects of a scene with fill words, which make captions longer
TRIES = 50  # rounds of drawing held-out scenes until all are different
TEXT_LENGTH = 40  # tokens that hold every caption and its end
EXAMPLE = "a large red circle at the left and a small blue cross at the right on white"


@dataclass(frozen=True)
class SceneObject:
    """One object; ``fill`` is one of ``FILLS``, or "" where the caption has no word for it (drawn plain)."""

    shape: str
    color: str
    size: str
    place: str
    fill: str = ""


@dataclass(frozen=True)
class MultiScene:
    """Different objects on a plain background, in the order of the caption.

    Raises:
        DitAttnError: too many objects, a color or shape twice, places that overlap, a fill on a small object.
    """

    objects: tuple[SceneObject, ...]
    background: str

    def __post_init__(self) -> None:
        problem = _problem(self.objects)
        if problem:
            raise DitAttnError(problem)

    @property
    def filled(self) -> bool:
        """Tell whether the caption has fill words."""
        return any(one.fill for one in self.objects)


def _problem(objects: tuple[SceneObject, ...]) -> str | None:
    """Why these objects are no scene."""
    most = MOST_FILLED if any(one.fill for one in objects) else MOST
    if not 1 <= len(objects) <= most:
        words = " with fill words" if most < MOST else ""
        return f"a scene{words} has 1 to {most} objects, got {len(objects)}"
    for name in ("color", "shape"):
        values = [getattr(one, name) for one in objects]
        twice = next((value for value in values if values.count(value) > 1), None)
        if twice:
            return f"two objects have the {name} {twice}; give each its own"
    for a, b in combinations(objects, 2):
        if not _fit_together(a.place, b.place):
            return f"objects at the {a.place} and at the {b.place} overlap; move one"
    bad = next((one for one in objects if one.size == "small" and one.fill not in ("", "plain")), None)
    return f"a small object cannot be {bad.fill}; its fill would not be visible" if bad else None


def _fit_together(a: str, b: str) -> bool:
    return max(abs(PLACES[a][0] - PLACES[b][0]), abs(PLACES[a][1] - PLACES[b][1])) >= APART


# ---------------------------------------------------------------------------------------------- captions


def caption(scene: MultiScene) -> str:
    """Write `scene` as one sentence; :func:`parse` inverts it."""
    objects = " and ".join(
        f"a {one.size} {one.fill}{' ' * bool(one.fill)}{one.color} {one.shape} at the {one.place}"
        for one in scene.objects
    )
    return f"{objects} on {scene.background}"


_OBJECT = re.compile(
    rf"a (?P<size>{'|'.join(SIZES)}) (?:(?P<fill>{'|'.join(FILLS)}) )?(?P<color>{'|'.join(COLORS)}) "
    rf"(?P<shape>{'|'.join(SHAPES)}) at the (?P<place>{'|'.join(sorted(PLACES, key=len, reverse=True))})"
)


def is_caption(text: str) -> bool:
    """Return whether `text` has the form of a caption, of objects that fit together or not."""
    return _read(text) is not None


def parse(text: str) -> MultiScene:
    """Return the scene that `text` describes; objects are joined by "and" or commas.

    Raises:
        DitAttnError: no caption of this world, or objects that do not fit together.
    """
    found = _read(text)
    if found is None:
        raise DitAttnError(f"{text!r} is not a caption of several objects; write it like {EXAMPLE!r}")
    return MultiScene(*found)


def _read(text: str) -> tuple[tuple[SceneObject, ...], str] | None:
    body, _, background = " ".join(text.lower().split()).rpartition(" on ")
    parts = [_OBJECT.fullmatch(part) for part in re.split(r" ?, ?and | ?, ?| and ", body)]
    if background not in BACKGROUNDS or not all(parts):
        return None
    fields = [{name: value or "" for name, value in part.groupdict().items()} for part in parts if part]
    return tuple(SceneObject(**values) for values in fields), background


def vocabulary() -> list[str]:
    """List every word that a caption can contain, sorted."""
    places = {word for place in PLACES for word in place.split()}
    return sorted({"a", "and", "at", "on", "the", *SIZES, *FILLS, *COLORS, *SHAPES, *places, *BACKGROUNDS})


def never_seen(scene: MultiScene) -> bool:
    """Tell whether a (color, shape) pair of `scene` is absent from all training captions."""
    return any((one.color, one.shape) in NEVER_SEEN for one in scene.objects)


def held_out(scene: MultiScene) -> bool:
    """Tell whether `scene` is for evaluation only: 1 in 8 by a hash, in any order, and all with a pair never seen."""
    order = list(PLACES)
    ordered = tuple(sorted(scene.objects, key=lambda one: order.index(one.place)))
    digest = hashlib.sha256(caption(MultiScene(ordered, scene.background)).encode()).digest()
    return never_seen(scene) or digest[0] % 8 == 0


# ---------------------------------------------------------------------------------------------- sampling


@lru_cache(maxsize=1)
def place_sets() -> dict[int, tuple[tuple[str, ...], ...]]:
    """List the sets of places that objects can have together, by their number."""
    return {
        count: tuple(
            places
            for places in combinations(PLACES, count)
            if all(_fit_together(a, b) for a, b in combinations(places, 2))
        )
        for count in range(1, MOST + 1)
    }


def sample_scenes(
    count: int, generator: torch.Generator, objects: tuple[int, int] = (1, MOST), filled: float = 0.0
) -> list[MultiScene]:
    """Draw `count` random training scenes.

    Args:
        objects: least and most objects of a scene, each number as often.
        filled: share of the scenes that have fill words, and at most ``MOST_FILLED`` objects.
    """
    low, high = objects
    counts = torch.randint(low, high + 1, (count,), generator=generator)
    return _sample(counts, torch.rand(count, generator=generator) < filled, generator, wanted=False)


def held_out_sample(
    count: int, seed: int = 0, objects: tuple[int, int] = (1, MOST), filled: bool = False
) -> list[MultiScene]:
    """Draw `count` different held-out scenes, with each number of objects in turn.

    Raises:
        DitAttnError: there seem to be fewer.
    """
    generator = torch.Generator().manual_seed(seed)
    low, high = objects
    counts = low + torch.arange(count) % (high - low + 1)
    found: dict[int, MultiScene] = {}
    captions: set[str] = set()
    for _ in range(TRIES):
        missing = [i for i in range(count) if i not in found]
        if not missing:
            return [found[i] for i in range(count)]
        drawn = _sample(counts[missing], torch.full((len(missing),), filled), generator, wanted=True)
        for i, scene in zip(missing, drawn, strict=True):
            if caption(scene) not in captions:
                captions.add(caption(scene))
                found[i] = scene
    raise DitAttnError(f"{count} different held-out captions of {low} to {high} objects were not found; request fewer")


def _sample(counts: torch.Tensor, filled: torch.Tensor, generator: torch.Generator, wanted: bool) -> list[MultiScene]:
    """One random scene per entry, drawn again until it is held out, or in training, as `wanted`."""
    counts = torch.where(filled, counts.clamp(max=MOST_FILLED), counts)
    out: list[MultiScene | None] = [None] * len(counts)
    left = list(range(len(counts)))
    while left:
        draws = torch.rand(len(left), 5, len(COLORS), generator=generator)
        ranks = draws[:, :3].argsort(-1).tolist()  # colors, then the order of shapes and places
        for row, numbers, i in zip(ranks, draws[:, 3:].tolist(), left, strict=True):
            scene = _make(row, numbers, int(counts[i]), bool(filled[i]))
            if held_out(scene) == wanted:
                out[i] = scene
        left = [i for i in left if out[i] is None]
    return [scene for scene in out if scene is not None]


def _make(ranks: list[list[int]], numbers: list[list[float]], count: int, filled: bool) -> MultiScene:
    """A scene from random ranks of 6 and numbers in [0, 1)."""
    colors, shapes, backgrounds = list(COLORS), [i for i in ranks[1] if i < len(SHAPES)], list(BACKGROUNDS)
    sets = place_sets()[count]
    places = sets[int(numbers[1][4] * len(sets))]
    order = [i for i in ranks[2] if i < count]
    sizes = ["large" if number < 0.5 else "small" for number in numbers[0]]
    kinds = [FILLS[int(number * len(FILLS))] if filled else "" for number in numbers[1]]
    fills = [fill if size == "large" or not filled else "plain" for fill, size in zip(kinds, sizes)]
    objects = tuple(
        SceneObject(SHAPES[shapes[k]], colors[ranks[0][k]], sizes[k], places[order[k]], fills[k]) for k in range(count)
    )
    return MultiScene(objects, backgrounds[int(numbers[0][5] * len(backgrounds))])


# ---------------------------------------------------------------------------------------------- drawing


def render_scenes(
    scenes: Sequence[MultiScene],
    height: int,
    width: int | None = None,
    *,
    generator: torch.Generator | None = None,
    shifts: torch.Tensor | None = None,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Draw `scenes` as images with anti-aliased edges: (B, 3, height, width) in [0, 1].

    Args:
        generator: CPU generator of each object's shift and of the phase of its fill; None draws the exact places.
        shifts: (objects of all scenes in their order, 2) x and y to add to the places, as fractions of the canvas.
    """
    width, device = width or height, torch.device(device)
    owned = [(i, one) for i, scene in enumerate(scenes) for one in scene.objects]
    owner = torch.tensor([i for i, _ in owned], device=device)
    shape = torch.tensor([SHAPES.index(one.shape) for _, one in owned], device=device)
    extent = torch.tensor([SIZES[one.size] for _, one in owned], device=device)
    color = torch.tensor([COLORS[one.color] for _, one in owned], device=device)
    fill = torch.tensor([FILLS.index(one.fill or "plain") for _, one in owned], device=device)
    center = torch.tensor([PLACES[one.place] for _, one in owned], device=device)
    phase = torch.zeros(len(owned), 2)
    if shifts is not None:
        center = center + shifts.to(device)
    if generator is not None:
        center = center + ((torch.rand(len(owned), 2, generator=generator) * 2 - 1) * JITTER).to(device)
        phase = torch.rand(len(owned), 2, generator=generator)
    alpha = coverage(shape, center, extent, height, width)[:, None]
    ground = torch.tensor([BACKGROUNDS[scene.background] for scene in scenes], device=device)[:, :, None, None]
    paint = color[:, :, None, None]
    if bool((fill > 0).any()):
        paint = paint * shade(fill, phase.to(device), height, width)[:, None]
    canvas = ground.expand(-1, -1, height, width).clone()
    return canvas.index_add_(0, owner, alpha * (paint - ground[owner])).clamp_(0, 1)
