"""The verifiable world: images and videos of simple shapes with exact captions.

Everything is procedural. A `Scene` (an image) or a `VideoScene` (a video) is a handful of words; `caption` writes them
as a sentence, `parse` reads the sentence back, `render_scenes` and `render_videos` draw them at any size, and
`dit_attn.eval.shapes_world.verify` finds the same words again in pixels. That makes "did the model do what the prompt
says" a question with an exact answer, with no downloaded network.

    scene = Scene(shape="circle", color="red", size="large", place="left", count=1, background="white")
    caption(scene)                       # 'a large red circle at the left on white'
    parse(caption(scene)) == scene       # True
    image = render_scenes([scene], 128)  # (1, 3, 128, 128) in [0, 1]

Coordinates are fractions of the canvas: (0, 0) is the top left corner, x runs right and y runs down.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import torch

from dit_attn.errors import DitAttnError

SHAPES = ("circle", "square", "triangle", "cross")
PLURALS = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses"}
COLORS: dict[str, tuple[float, float, float]] = {
    "red": (0.90, 0.12, 0.12),
    "green": (0.10, 0.72, 0.20),
    "blue": (0.12, 0.22, 0.95),
    "yellow": (1.00, 0.85, 0.08),
    "purple": (0.62, 0.10, 0.80),
    "cyan": (0.10, 0.85, 0.92),
}
BACKGROUNDS: dict[str, tuple[float, float, float]] = {
    "white": (1.0, 1.0, 1.0),
    "gray": (0.5, 0.5, 0.5),
    "black": (0.0, 0.0, 0.0),
}
SIZES = {"small": 0.13, "large": 0.21}  # half of the extent
COUNTS = {1: "a", 2: "two", 3: "three"}
PLACES: dict[str, tuple[float, float]] = {
    "left": (0.27, 0.5),
    "right": (0.73, 0.5),
    "top": (0.5, 0.27),
    "bottom": (0.5, 0.73),
    "center": (0.5, 0.5),
}
ARRANGEMENTS = ("row", "column")
SPREAD = {2: (0.26, 0.74), 3: (0.18, 0.5, 0.82)}  # centers along the row or column
DIRECTIONS: dict[str, tuple[int, int]] = {
    "left": (-1, 0),
    "right": (1, 0),
    "up": (0, -1),
    "down": (0, 1),
    "still": (0, 0),
}
SPEEDS = {"slow": ("slowly", 0.20), "fast": ("fast", 0.45), "still": ("", 0.0)}  # word, distance over the video
JITTER = 0.03
NEVER_SEEN = (("blue", "cross"), ("yellow", "triangle"))
"""(color, shape) pairs that no training caption contains."""


@dataclass(frozen=True)
class Scene:
    """An image: `count` equal shapes on a plain background.

    Args:
        place: for one object one of `PLACES`, for several one of `ARRANGEMENTS`.
    """

    shape: str
    color: str
    size: str
    place: str
    count: int
    background: str


@dataclass(frozen=True)
class VideoScene:
    """A video: one shape that crosses the middle of a plain background, or stands still."""

    shape: str
    color: str
    size: str
    direction: str
    speed: str
    background: str


Item = Scene | VideoScene


def caption(item: Item) -> str:
    """Write `item` as one sentence; `parse` inverts it."""
    if isinstance(item, VideoScene):
        motion = "standing still" if item.direction == "still" else f"moving {item.direction} {SPEEDS[item.speed][0]}"
        return f"a {item.size} {item.color} {item.shape} {motion} on {item.background}"
    noun = item.shape if item.count == 1 else PLURALS[item.shape]
    where = f"at the {item.place}" if item.count == 1 else f"in a {item.place}"
    return f"{COUNTS[item.count]} {item.size} {item.color} {noun} {where} on {item.background}"


@lru_cache(maxsize=1)
def _by_caption() -> dict[str, Item]:
    items: tuple[Item, ...] = (*all_scenes(), *all_videos())
    return {caption(item): item for item in items}


def parse(text: str) -> Item:
    """Return the scene that `text` describes.

    Raises:
        DitAttnError: the text is not a caption of this world.
    """
    item = _by_caption().get(" ".join(text.lower().replace(",", " ").split()))
    if item is None:
        raise DitAttnError(
            f"{text!r} is not a caption of the shapes world; write it like "
            "'a large red circle at the left on white', 'two small blue squares in a row on black' "
            "or 'a small green cross moving up fast on gray'."
        )
    return item


def vocabulary() -> list[str]:
    """List every word that a caption can contain, sorted."""
    return sorted({word for text in _by_caption() for word in text.split()})


@lru_cache(maxsize=1)
def all_scenes() -> tuple[Scene, ...]:
    """List every image scene of the world, in a fixed order."""
    layouts = [(1, place, size) for place in PLACES for size in SIZES]
    layouts += [(2, place, size) for place in ARRANGEMENTS for size in SIZES]
    layouts += [(3, place, "small") for place in ARRANGEMENTS]
    return tuple(
        Scene(shape, color, size, place, count, background)
        for (count, place, size), shape, color, background in product(layouts, SHAPES, COLORS, BACKGROUNDS)
    )


@lru_cache(maxsize=1)
def all_videos() -> tuple[VideoScene, ...]:
    """List every video scene of the world, in a fixed order."""
    motions = [(d, s) for d in DIRECTIONS for s in ("slow", "fast") if d != "still"] + [("still", "still")]
    return tuple(
        VideoScene(shape, color, size, direction, speed, background)
        for (direction, speed), shape, color, size, background in product(motions, SHAPES, COLORS, SIZES, BACKGROUNDS)
    )


def never_seen(item: Item) -> bool:
    """Tell whether the (color, shape) pair of `item` is absent from all training captions."""
    return (item.color, item.shape) in NEVER_SEEN


def held_out(item: Item) -> bool:
    """Tell whether `item` is for evaluation only: 1 in 8 by a hash of its caption, and all `NEVER_SEEN` pairs."""
    digest = hashlib.sha256(caption(item).encode()).digest()
    return never_seen(item) or digest[0] % 8 == 0


@lru_cache(maxsize=4)
def split(kind: str) -> tuple[tuple[Item, ...], tuple[Item, ...]]:
    """Split the items of `kind`, "image" or "video", into (training, held-out)."""
    items: tuple[Item, ...] = all_scenes() if kind == "image" else all_videos()
    return tuple(i for i in items if not held_out(i)), tuple(i for i in items if held_out(i))


def held_out_sample(kind: str, count: int, seed: int = 0) -> list[Item]:
    """Draw `count` different held-out items in a seeded random order.

    Raises:
        DitAttnError: fewer exist.
    """
    items = split(kind)[1]
    if count > len(items):
        raise DitAttnError(
            f"the shapes world has {len(items)} held-out {kind} captions, {count} were requested; request fewer"
        )
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed)).tolist()
    return [items[i] for i in order[:count]]


# ---------------------------------------------------------------------------------------------- drawing


def _distance(shape: str, x: torch.Tensor, y: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    """Signed distance to one of the `SHAPES` of half extent `r` at the origin, negative inside."""
    if shape == "circle":
        return (x * x + y * y).sqrt() - r
    ax, ay = x.abs(), y.abs()
    if shape == "square":
        return torch.maximum(ax, ay) - r
    if shape == "triangle":
        return torch.maximum(y - r, (2 * ax - y - r) / 5**0.5)
    arm = r / 3
    return torch.minimum(torch.maximum(ax - r, ay - arm), torch.maximum(ax - arm, ay - r))


def coverage(
    shape: torch.Tensor,
    center: torch.Tensor,
    extent: torch.Tensor,
    height: int,
    width: int,
    window: tuple[slice, slice] = (slice(None), slice(None)),
) -> torch.Tensor:
    """Compute how much of each pixel a shape covers, anti-aliased over one pixel: (N, height, width).

    Args:
        shape: (N,) int64 index into `SHAPES`.
        center: (N, 2) x and y as fractions of the canvas.
        extent: (N,) half extent as a fraction of the canvas.
        window: rows and columns to compute only.
    """
    ys = ((torch.arange(height, device=center.device) + 0.5) / height)[window[0]]
    xs = ((torch.arange(width, device=center.device) + 0.5) / width)[window[1]]
    x = xs[None, None, :] - center[:, 0, None, None]
    y = ys[None, :, None] - center[:, 1, None, None]
    out = torch.empty(len(shape), len(ys), len(xs), device=center.device)
    for index, name in enumerate(SHAPES):
        rows = (shape == index).nonzero()[:, 0]
        if len(rows):
            distance = _distance(name, x[rows], y[rows], extent[rows, None, None])
            out[rows] = (0.5 - distance * min(height, width)).clamp(0, 1)
    return out


def _rgb(names: Sequence[str], table: dict[str, tuple[float, float, float]], device: torch.device) -> torch.Tensor:
    return torch.tensor([table[name] for name in names], device=device)


def _noise(shape: tuple[int, ...], generator: torch.Generator | None, device: torch.device) -> torch.Tensor:
    """Uniform jitter in +-`JITTER`, drawn on the CPU so that every device sees the same world; 0 without generator."""
    if generator is None:
        return torch.zeros(shape, device=device)
    return ((torch.rand(shape, generator=generator) * 2 - 1) * JITTER).to(device)


def centers(scene: Scene) -> list[tuple[float, float]]:
    """Return the centers (x, y) of the objects of `scene`, without jitter."""
    if scene.count == 1:
        return [PLACES[scene.place]]
    along = SPREAD[scene.count]
    return [(a, 0.5) for a in along] if scene.place == "row" else [(0.5, a) for a in along]


def render_scenes(
    scenes: Sequence[Scene],
    height: int,
    width: int | None = None,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Draw `scenes` as images with anti-aliased edges: (B, 3, height, width) in [0, 1].

    Args:
        generator: CPU generator of the position jitter (one shift per scene); None draws the exact places.
    """
    width, device = width or height, torch.device(device)
    canvas = _rgb([s.background for s in scenes], BACKGROUNDS, device)[:, :, None, None].expand(-1, -1, height, width)
    canvas = canvas.clone()
    shift = _noise((len(scenes), 2), generator, device)
    owners, places = zip(*[(i, c) for i, s in enumerate(scenes) for c in centers(s)], strict=True)
    owner = torch.tensor(owners, device=device)
    shape = torch.tensor([SHAPES.index(scenes[i].shape) for i in owners], device=device)
    extent = torch.tensor([SIZES[scenes[i].size] for i in owners], device=device)
    alpha = coverage(shape, torch.tensor(places, device=device) + shift[owner], extent, height, width)
    merged = torch.zeros(len(scenes), height, width, device=device).index_add_(0, owner, alpha)
    color = _rgb([s.color for s in scenes], COLORS, device)[:, :, None, None]
    return torch.lerp(canvas, color, merged.clamp(max=1)[:, None])


def render_videos(
    scenes: Sequence[VideoScene],
    frames: int,
    height: int,
    width: int | None = None,
    *,
    first: int | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Draw `scenes` as videos with anti-aliased edges: (B, 3, frames, height, width) in [0, 1].

    The path has its middle at the middle of the canvas; a video of one frame shows that middle.

    Args:
        frames: length of the full video.
        first: draw only this many frames from the start.
        generator: CPU generator of the position jitter (one shift per video); None draws the exact path.
    """
    width, device = width or height, torch.device(device)
    steps = torch.linspace(-0.5, 0.5, frames, device=device) if frames > 1 else torch.zeros(1, device=device)
    steps = steps[:first]
    frames = len(steps)
    heading = torch.tensor([DIRECTIONS[c.direction] for c in scenes], device=device, dtype=torch.float32)
    distance = torch.tensor([SPEEDS[c.speed][1] for c in scenes], device=device)
    travel = (heading * distance[:, None])[:, None, :] * steps[None, :, None]
    center = 0.5 + travel + _noise((len(scenes), 2), generator, device)[:, None, :]
    shape = torch.tensor([SHAPES.index(c.shape) for c in scenes], device=device).repeat_interleave(frames)
    extent = torch.tensor([SIZES[c.size] for c in scenes], device=device).repeat_interleave(frames)
    alpha = coverage(shape, center.reshape(-1, 2), extent, height, width).view(len(scenes), 1, frames, height, width)
    canvas = _rgb([c.background for c in scenes], BACKGROUNDS, device)[:, :, None, None, None]
    color = _rgb([c.color for c in scenes], COLORS, device)[:, :, None, None, None]
    return torch.lerp(canvas.expand(-1, -1, frames, height, width), color.expand(-1, -1, frames, height, width), alpha)


TRAINING_COUNTS = {1: 0.76, 2: 0.14, 3: 0.10}


def sample_scenes(count: int, generator: torch.Generator, single: bool = False) -> list[Scene]:
    """Draw `count` random training image scenes, most of one object (`TRAINING_COUNTS`), or all with `single`."""
    groups = _training_groups()
    weights = torch.tensor([1.0, 0.0, 0.0] if single else list(TRAINING_COUNTS.values()))
    picks = torch.multinomial(weights, count, replacement=True, generator=generator).tolist()
    draws = torch.rand(count, generator=generator).tolist()
    return [groups[p][int(d * len(groups[p]))] for p, d in zip(picks, draws, strict=True)]


@lru_cache(maxsize=1)
def _training_groups() -> tuple[tuple[Scene, ...], ...]:
    scenes = [i for i in split("image")[0] if isinstance(i, Scene)]
    return tuple(tuple(s for s in scenes if s.count == n) for n in COUNTS)


def sample_videos(count: int, generator: torch.Generator) -> list[VideoScene]:
    """Draw `count` random training video scenes."""
    items = [i for i in split("video")[0] if isinstance(i, VideoScene)]
    return [items[i] for i in torch.randint(len(items), (count,), generator=generator).tolist()]
