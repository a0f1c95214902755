"""How drawn an image's objects look: each outline compared with that of the drawing that fits it best.

Both figures are measured the same way on the image and on the drawing, so that a drawn image gives 1 at any size:

* ``perimeter``: length of the outline, ragged or not, over that of the drawing.
* ``edge_width``: width in pixels of the linear ramp that is as soft as the object's edge. A drawn edge is one pixel
  wide.

The outline is the half-coverage level of the object's color against the background, by marching squares (Lorensen and
Cline 1987) with linear interpolation. Only pixels within ``REACH`` of an object count as its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dit_attn.eval.shapes_world.verify import DetectedObject, as_array, backdrop, segment, window_around
from dit_attn.eval.shapes_world.world import SHAPES, coverage

REACH = 1 / 16  # of the canvas
FLAT = 0.05  # coverage this near to 0 or 1 is no edge: noise and color that varies
SOFTEN = 0.8  # pixels (standard deviation): edges are softened before their width is measured, against aliasing
HALF_COVERED = 0.4534  # integral of a (1 - a) over a Gaussian edge of standard deviation 1, a clipped at ``FLAT``
ROUNDS = 8  # of the fit
PIXELS = 0.5  # step of the fit's finite differences


@dataclass(frozen=True)
class Outline:
    """Outline of one object compared with the best-fitting drawing's.

    Attributes:
        shape: of the drawing.
        perimeter: length over the drawing's.
        edge_width: in pixels; a drawn edge has 1.
    """

    shape: str
    perimeter: float
    edge_width: float


def measure_outlines(image: Any) -> list[Outline]:
    """Measure the outline of every object in `image`, largest object first.

    Args:
        image: PIL image, (H, W, 3) array (uint8 or float) or (3, H, W) tensor in [0, 1]; one plain background.

    Raises:
        DitAttnError: none of these.
    """
    pixels = as_array(image)
    found = segment(pixels)
    ground = backdrop(pixels)
    return [
        _compare(np.where(near, _blend(pixels, ground, np.array(one.rgb)), 0.0), one)
        for (one, _), near in zip(found, _surroundings([region for _, region in found]), strict=True)
    ]


def mean_outline(frames: Any) -> dict[str, float | None]:
    """Return the mean ``perimeter`` and ``edge-width`` over the objects of an image or of a video's frames.

    Args:
        frames: sequence of images, each as for :func:`measure_outlines`.

    Returns:
        Both figures; ``None`` where there is no object.
    """
    found = [one for frame in frames for one in measure_outlines(frame)]
    if not found:
        return {"perimeter": None, "edge-width": None}
    mean = np.mean([(one.perimeter, one.edge_width) for one in found], axis=0)
    return {"perimeter": float(mean[0]), "edge-width": float(mean[1])}


def contour_length(field: np.ndarray, level: float = 0.5) -> float:
    """Measure the length in pixels of the contour of a (H, W) field at `level`, closed at the canvas's border."""
    padded = np.pad(field.astype(np.float64), 1) - level
    corners = padded[:-1, :-1], padded[:-1, 1:], padded[1:, 1:], padded[1:, :-1]  # clockwise from the top left
    sides = [_crossing(corners[i], corners[(i + 1) % 4]) for i in range(4)]
    at = [(where, np.stack(_place(i, t))) for i, (where, t) in enumerate(sides)]
    crossed = np.stack([where for where, _ in at])
    points = np.where(crossed[:, None], np.stack([point for _, point in at]), 0.0)  # (side, x or y, row, column)
    total = np.square(points.sum(0)).sum(0)
    lone = np.sqrt(np.maximum(2 * np.square(points).sum((0, 1)) - total, 0.0))  # |p - q| of the two points of a cell
    count = crossed.sum(0)
    # In a saddle the contour cuts off the two corners whose sign the middle does not have.
    middle = sum(corners) > 0
    top, right, bottom, left = (point for _, point in at)
    first = _apart(top, left) + _apart(right, bottom)
    second = _apart(top, right) + _apart(left, bottom)
    saddle = np.where((corners[0] > 0) == middle, second, first)
    return float(np.where(count == 4, saddle, np.where(count == 2, lone, 0.0)).sum())


def _crossing(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the sign changes between two corners, and at which share of the way."""
    where = (a > 0) != (b > 0)
    return where, np.divide(a, a - b, out=np.zeros_like(a), where=where)


def _place(side: int, share: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(x, y) in the cell of a point at `share` of a side; sides run clockwise from the top left corner."""
    zero, one = np.zeros_like(share), np.ones_like(share)
    return ((share, zero), (one, share), (1 - share, one), (zero, 1 - share))[side]


def _apart(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.hypot(*(a - b))


def _surroundings(regions: list[np.ndarray]) -> list[np.ndarray]:
    """(H, W) bool of each region: the pixels within ``REACH`` that no other region is nearer to."""
    from scipy import ndimage

    if not regions:
        return []
    distances = np.stack([ndimage.distance_transform_edt(~region) for region in regions])
    nearest, reach = distances.argmin(0), max(2.0, REACH * min(regions[0].shape))
    return [(nearest == i) & (distances[i] <= reach) for i in range(len(regions))]


def _blend(pixels: np.ndarray, ground: np.ndarray, color: np.ndarray) -> np.ndarray:
    """(H, W) share in [0, 1] of `color` in every pixel, the rest being `ground`."""
    way = color - ground
    return np.clip((pixels - ground) @ way / max(float(way @ way), 1e-9), 0.0, 1.0)


def _compare(field: np.ndarray, found: DetectedObject) -> Outline:
    drawing = _fit(field, found)
    length, drawn = contour_length(field), contour_length(drawing)
    softer = _softness(field, length) ** 2 - _softness(drawing, drawn) ** 2
    return Outline(found.shape, length / drawn, math.sqrt(max(1 + 12 * softer, 0.0)))  # a ramp's variance is w^2 / 12


def _softness(field: np.ndarray, length: float) -> float:
    """Standard deviation in pixels of the Gaussian edge that has the same sum of a (1 - a) for each pixel of length."""
    from scipy import ndimage

    covered = np.clip((ndimage.gaussian_filter(field, SOFTEN) - FLAT) / (1 - 2 * FLAT), 0.0, 1.0)
    return float((covered * (1 - covered)).sum()) / max(length, 1e-9) / HALF_COVERED


def _fit(field: np.ndarray, found: DetectedObject) -> np.ndarray:
    """(H, W) coverage of the drawing of ``found.shape`` nearest to `field` in the mean square (Gauss-Newton)."""
    at = torch.tensor([found.x, found.y, found.extent], dtype=torch.float32)
    height, width = field.shape
    near = window_around(found.x, found.y, found.extent, field.shape, margin=math.ceil(REACH * max(field.shape)) + 4)
    goal = torch.from_numpy(field[near]).float().flatten()
    steps = PIXELS * torch.tensor([1 / width, 1 / height, 1 / min(height, width)])
    moves = torch.cat([torch.zeros(1, 3), torch.diag(steps), -torch.diag(steps)])
    shape = torch.full((len(moves),), SHAPES.index(found.shape))
    best, error = at, float("inf")
    for _ in range(ROUNDS):
        tries = at + moves
        drawn = coverage(shape, tries[:, :2], tries[:, 2], height, width, near).flatten(1)
        errors = (drawn - goal).square().sum(1)
        if float(errors.min()) >= error:
            break
        best, error = tries[int(errors.argmin())], float(errors.min())
        slopes = ((drawn[1:4] - drawn[4:]) / 2).T  # for one step
        change = torch.linalg.lstsq(slopes, (goal - drawn[0])[:, None]).solution[:, 0]
        at = at + steps * change.clamp(-4, 4)
    drawn = coverage(shape[:1], best[None, :2], best[None, 2], height, width)
    return drawn[0].numpy().astype(np.float64)
