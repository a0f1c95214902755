"""Masks of new defects: given ones, real ones moved and turned, or drawn; each placed on the product."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy import ndimage

from dit_attn.errors import DitAttnError

_TRIES = 60  # places
_SHAPES = 4
_INSIDE = 0.95  # of a mask must lie on the product


def foreground(pixels: np.ndarray) -> np.ndarray:
    """Find the product on a plain background: (H, W) bool; everything for a texture that fills the image.

    The background is what looks like the border of the image; a product must differ from nearly all of it.
    """
    image = ndimage.gaussian_filter(pixels.astype(np.float64) / 255, (1, 1, 0))
    edge = max(1, min(image.shape[:2]) // 40)
    inner = np.zeros(image.shape[:2], bool)
    inner[edge:-edge, edge:-edge] = True
    border = image[~inner]
    deviation = np.maximum(border.std(0), 0.02)
    far = (np.abs(image - np.median(border, 0)) / deviation).max(-1) > 4
    share = far[inner].mean()
    if not 0.05 < share < 0.98 or far[~inner].mean() > 0.15 or border.std(0).max() > 0.12:
        return np.ones(image.shape[:2], bool)
    found = ndimage.binary_opening(far, iterations=1)
    return found if found.any() else np.ones(image.shape[:2], bool)


def boxed(mask: np.ndarray) -> np.ndarray:
    """Return a mask cut to its box."""
    rows, columns = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
    return mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def find_place(part: np.ndarray, region: np.ndarray, rng: np.random.Generator) -> tuple[int, int]:
    """Draw a place where a mask lies inside a region.

    Args:
        part: (h, w) bool.
        region: (H, W) bool.
        rng: random numbers.

    Returns:
        Row and column of its upper left corner.

    Raises:
        DitAttnError: it fits nowhere.
    """
    height, width = region.shape
    spots = np.argwhere(region)
    if part.shape[0] <= height and part.shape[1] <= width and len(spots):
        for _ in range(_TRIES):
            cy, cx = spots[rng.integers(len(spots))]
            top = int(np.clip(cy - part.shape[0] // 2, 0, height - part.shape[0]))
            left = int(np.clip(cx - part.shape[1] // 2, 0, width - part.shape[1]))
            here = region[top : top + part.shape[0], left : left + part.shape[1]]
            if (part & here).sum() >= _INSIDE * part.sum():
                return top, left
    raise DitAttnError("a mask fits nowhere on the product; give larger images, smaller masks or another --roi")


def placed(mask: np.ndarray, region: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Move a mask to a random place in a region of another image.

    Args:
        mask: (h, w) bool, cut to its box or not.
        region: (H, W) bool.
        rng: random numbers.

    Raises:
        DitAttnError: it fits nowhere.
    """
    part = boxed(mask)
    top, left = find_place(part, region, rng)
    box = slice(top, top + part.shape[0]), slice(left, left + part.shape[1])
    out = np.zeros(region.shape, bool)
    out[box] = part & region[box]
    return out


def augmented(mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Turn, flip, scale and bend a real mask a little: (h, w) bool, cut to its box."""
    part = boxed(mask)
    pad = int(0.35 * max(part.shape)) + 3
    wide = np.pad(part, pad).astype(np.float64)
    if rng.uniform() < 0.5:
        wide = wide[:, ::-1]
    if rng.uniform() < 0.5:
        wide = wide[::-1]
    turn, scale = np.deg2rad(rng.uniform(-25, 25)), rng.uniform(0.85, 1.2)
    matrix = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]) / scale
    center = (np.array(wide.shape) - 1) / 2
    bend = [ndimage.gaussian_filter(rng.normal(size=wide.shape), max(2.0, pad / 2)) for _ in range(2)]
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in wide.shape), indexing="ij")).astype(np.float64)
    places = np.tensordot(matrix, grid - center[:, None, None], 1) + center[:, None, None]
    for axis, field_ in enumerate(bend):
        places[axis] += 0.06 * max(part.shape) * field_ / (np.abs(field_).max() + 1e-9)
    out = ndimage.map_coordinates(wide, places, order=1) > 0.5
    return out if out.any() else part


def spread(mask: np.ndarray) -> tuple[float, float]:
    """Return the standard deviation of a mask's pixels across and along its longest axis, in pixels."""
    places = np.stack(np.nonzero(mask))
    values = np.linalg.eigvalsh(np.cov(places) + 1e-6) if places.shape[1] > 2 else np.array([1.0, 1.0])
    return float(np.sqrt(max(values[0], 0.1))), float(np.sqrt(values[1]))


def drawn(shapes: Sequence[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """Draw a new mask with the area and elongation of one of the real ones: a blob, or a stroke."""
    model = shapes[int(rng.integers(len(shapes)))]
    area = float(model.sum()) * rng.uniform(0.7, 1.4)
    across, along = spread(model)
    elongated = along / across
    if elongated > 3:
        length = max(6, int(np.sqrt(12) * along))
        side = 2 * length + 8
        steps = 12
        angle = rng.uniform(0, 2 * np.pi) + np.cumsum(rng.normal(0, 0.15, steps))
        path = np.cumsum(np.stack([np.sin(angle), np.cos(angle)], 1) * length / steps, 0)
        path = np.repeat(path - path.mean(0) + side / 2, 8, axis=0)
        path = ndimage.uniform_filter1d(path, 8, axis=0)
        line = np.ones((side, side), bool)
        line[tuple(np.clip(path.round().astype(int), 0, side - 1).T)] = False
        return ndimage.distance_transform_edt(line) <= max(0.5, area / length / 2)
    side = int(3 * np.sqrt(area)) + 6
    y, x = np.mgrid[:side, :side] - side / 2
    turn, flat = rng.uniform(0, np.pi), np.sqrt(max(1.0, elongated))
    u, v = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
    field_ = -np.hypot(u / flat, v * flat) / side
    field_ = field_ + 0.08 * _smooth(rng, side)
    level = np.sort(field_, axis=None)[-min(int(area), field_.size - 1)]
    return field_ >= level


def _smooth(rng: np.random.Generator, side: int) -> np.ndarray:
    found = ndimage.gaussian_filter(rng.normal(size=(side, side)), side / 10)
    return found / (found.std() + 1e-9)


@dataclass
class MaskSource:
    """Where masks come from.

    Attributes:
        kind: ``"real"`` (real ones, augmented and placed), ``"drawn"`` (procedural, of their size), ``"learned"`` (by a
            mask model) or ``"given"``.
        shapes: masks of the shots, or the given ones.
        draw: returns a learned mask; of that kind alone.
    """

    kind: str
    shapes: list[np.ndarray] = field(default_factory=list)
    draw: Callable[[np.random.Generator], np.ndarray] | None = None

    def shape(self, rng: np.random.Generator) -> np.ndarray:
        """Return a mask (h, w) bool that lies nowhere yet; a given one as it is."""
        if self.kind == "drawn":
            return drawn(self.shapes, rng)
        if self.draw is not None:
            return self.draw(rng)
        mask = self.shapes[int(rng.integers(len(self.shapes)))]
        return mask if self.kind == "given" else augmented(mask, rng)

    def sample(self, region: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return a mask (H, W) bool for an image whose product is ``region``.

        Raises:
            DitAttnError: it fits nowhere.
        """
        if self.kind == "given":
            mask = self.shape(rng)
            return mask if mask.shape == region.shape else placed(mask, region, rng)
        for _ in range(_SHAPES):  # a turned mask may be too wide
            shape = self.shape(rng)
            try:
                return placed(shape, region, rng)
            except DitAttnError:
                continue
        last = self.shape(rng) if self.draw is not None else self.shapes[int(rng.integers(len(self.shapes)))]
        return placed(last, region, rng)
