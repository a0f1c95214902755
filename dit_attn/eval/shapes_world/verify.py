"""Verifiers: describe an image or video of the shapes world in words and compare them with the prompt.

An image is segmented against its background (the median of its border), split into connected components, and each
component gets its color (nearest palette entry of its core), its shape (best overlap with a drawn template over small
shifts and sizes), its extent and its center. A video gets the same per frame, plus the path of its center.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dit_attn.errors import DitAttnError
from dit_attn.eval.shapes_world.world import (
    BACKGROUNDS,
    COLORS,
    DIRECTIONS,
    PLACES,
    SHAPES,
    SIZES,
    SPEEDS,
    Scene,
    VideoScene,
    centers,
    coverage,
)

MIN_AREA = 0.008  # of the canvas; smaller specks are noise
MIN_OVERLAP = 0.6
PLACE_RADIUS = 0.12
STILL_RADIUS = 0.06
CONTRAST = 0.22  # distance from the background, in RGB units, that counts as an object


@dataclass(frozen=True)
class DetectedObject:
    """One object found in an image; lengths are fractions of the canvas.

    ``rgb`` is its color as it is, ``color`` the nearest entry of the palette; ``overlap`` how well ``shape`` fits it.
    """

    shape: str
    overlap: float
    color: str
    size: str
    x: float
    y: float
    extent: float
    rgb: tuple[float, float, float]


def _nearest(color: np.ndarray, table: dict[str, tuple[float, float, float]]) -> str:
    return min(table, key=lambda name: float(np.square(color - np.array(table[name])).sum()))


def nearest_color(rgb: np.ndarray) -> str:
    """Name the palette entry nearest to (3,) RGB."""
    return _nearest(rgb, COLORS)


def as_array(image: Any) -> np.ndarray:
    """Convert a PIL image, (H, W, 3) array (uint8 or float) or (3, H, W) tensor to (H, W, 3) float in [0, 1].

    Raises:
        DitAttnError: none of these.
    """
    if isinstance(image, torch.Tensor):
        image = image.detach().float().cpu().numpy()
        if image.ndim == 3 and image.shape[0] == 3:
            image = image.transpose(1, 2, 0)
    array = np.asarray(image)
    if array.dtype == np.uint8:
        array = array.astype(np.float32) / 255
    if array.ndim != 3 or array.shape[2] < 3:
        raise DitAttnError(f"an image to verify must be (H, W, 3) or (3, H, W), got shape {tuple(array.shape)}")
    return np.clip(array[..., :3].astype(np.float32), 0, 1)


def backdrop(pixels: np.ndarray) -> np.ndarray:
    """Return the (3,) median color of the border of (H, W, 3) pixels."""
    return np.median(np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]), axis=0)


def contrast(pixels: np.ndarray) -> np.ndarray:
    """Compute (H, W), the RGB distance of every pixel from the background, a little smoothed against noise."""
    from scipy import ndimage

    distance = np.sqrt(np.square(pixels - backdrop(pixels)).sum(-1))
    return ndimage.gaussian_filter(distance, sigma=max(0.4, len(pixels) / 160))


def background_of(pixels: np.ndarray) -> str:
    """Name the background: the nearest palette entry of the border's median."""
    return _nearest(backdrop(pixels), BACKGROUNDS)


def detect_objects(image: Any) -> list[DetectedObject]:
    """Find the objects in `image`, largest first."""
    return [found for found, _ in segment(as_array(image))]


def segment(pixels: np.ndarray) -> list[tuple[DetectedObject, np.ndarray]]:
    """Find the objects in (H, W, 3) pixels in [0, 1], largest first, each with its connected region (H, W) bool."""
    from scipy import ndimage

    height, width = pixels.shape[:2]
    smooth = contrast(pixels)
    labels, _ = ndimage.label(smooth > CONTRAST)
    areas = np.bincount(labels.ravel())
    areas[0] = 0  # the background
    large = [index for index in np.argsort(-areas, kind="stable") if areas[index] >= MIN_AREA * height * width]
    return [(_describe(pixels, smooth, labels == index), labels == index) for index in large]


def _describe(pixels: np.ndarray, smooth: np.ndarray, region: np.ndarray) -> DetectedObject:
    """Color, shape, size and center of one connected region."""
    height, width = region.shape
    peak = np.percentile(smooth[region], 80)
    core = region & (smooth > 0.8 * peak)
    rgb = np.median(pixels[core], axis=0)
    body = region & (smooth > 0.5 * peak)  # the half-contrast contour is the edge, blurred or not
    rows, columns = np.nonzero(body)
    left, right = (columns.min()) / width, (columns.max() + 1) / width
    top, bottom = (rows.min()) / height, (rows.max() + 1) / height
    box = ((left + right) / 2, (top + bottom) / 2, max(right - left, bottom - top) / 2)
    shape, overlap, (x, y, extent) = _match(body, box)
    size = min(SIZES, key=lambda name: abs(SIZES[name] - extent))
    red, green, blue = map(float, rgb)
    return DetectedObject(shape, overlap, nearest_color(rgb), size, x, y, extent, (red, green, blue))


def _match(body: np.ndarray, box: tuple[float, float, float]) -> tuple[str, float, tuple[float, float, float]]:
    """Best shape, its overlap (intersection over union) and its (x, y, extent), searched around `box`."""
    x, y, extent = box
    step = 1 / body.shape[1]
    offsets = [-1.5 * step, 0.0, 1.5 * step]
    fits = [(x + i, y + j, extent * k) for i in offsets for j in offsets for k in (0.82, 0.91, 1.0)]
    shape = torch.arange(len(SHAPES)).repeat_interleave(len(fits))
    grid = torch.tensor(fits, dtype=torch.float32).repeat(len(SHAPES), 1)
    near = window_around(x, y, extent, body.shape, margin=4)
    masks = coverage(shape, grid[:, :2], grid[:, 2], body.shape[0], body.shape[1], near).numpy() > 0.5
    inter = (masks & body[near]).sum((1, 2))
    union = (masks | body[near]).sum((1, 2))
    overlaps = inter / np.maximum(union, 1)
    best = int(overlaps.argmax())
    return SHAPES[int(shape[best])], float(overlaps[best]), fits[best % len(fits)]


def window_around(x: float, y: float, extent: float, shape: tuple[int, ...], margin: int) -> tuple[slice, slice]:
    """Return the rows and columns of a (H, W) canvas within ``extent`` of a point and ``margin`` pixels more."""
    spans = []
    for at, size in ((y, shape[0]), (x, shape[1])):
        low, high = math.floor((at - extent) * size) - margin, math.ceil((at + extent) * size) + margin
        spans.append(slice(max(low, 0), min(high, size)))
    return spans[0], spans[1]


def verify_image(image: Any, scene: Scene) -> dict[str, bool]:
    """Check which attributes of `scene` the image shows: background, count, color, shape, size, place.

    Args:
        image: PIL image, (H, W, 3) array or (3, H, W) tensor in [0, 1].
        scene: what the prompt says.
    """
    found = detect_objects(image)
    targets = centers(scene)
    return {
        "background": background_of(as_array(image)) == scene.background,
        "count": len(found) == scene.count,
        "color": _all(found, lambda t: t.color == scene.color),
        "shape": _all(found, lambda t: t.shape == scene.shape and t.overlap >= MIN_OVERLAP),
        "size": _all(found, lambda t: t.size == scene.size),
        "place": _placed(found, scene, targets),
    }


def _all(found: list[DetectedObject], test: Any) -> bool:
    return bool(found) and all(test(t) for t in found)


def _placed(found: list[DetectedObject], scene: Scene, targets: list[tuple[float, float]]) -> bool:
    """Every expected center has an object near it; a lone object must also be nearest to its own place."""
    if not found:
        return False
    near = [min(np.hypot(t.x - x, t.y - y) for t in found) <= PLACE_RADIUS for x, y in targets]
    if scene.count == 1:
        alone = found[0]
        closest = min(PLACES, key=lambda name: np.hypot(alone.x - PLACES[name][0], alone.y - PLACES[name][1]))
        return all(near) and closest == scene.place
    return all(near)


def verify_video(frames: Any, scene: VideoScene) -> dict[str, bool]:
    """Check which attributes of `scene` the video shows: background, count, color, shape, size, direction, speed.

    Appearance is judged by the majority of frames, motion by the path of the largest object between the first and last
    quarter of the video.

    Args:
        frames: sequence of images, each as for `verify_image`; or a (3, F, H, W) tensor.
        scene: what the prompt says.
    """
    if isinstance(frames, torch.Tensor) and frames.ndim == 4 and frames.shape[0] == 3:
        frames = frames.permute(1, 0, 2, 3)
    images = [as_array(frame) for frame in frames]
    found = [detect_objects(image) for image in images]
    direction, speed = _motion(found)

    def most(flags: list[bool]) -> bool:
        return sum(flags) * 2 > len(flags)

    return {
        "background": _vote([background_of(image) for image in images]) == scene.background,
        "count": most([len(f) == 1 for f in found]),
        "color": most([bool(f) and f[0].color == scene.color for f in found]),
        "shape": most([bool(f) and f[0].shape == scene.shape and f[0].overlap >= MIN_OVERLAP for f in found]),
        "size": most([bool(f) and f[0].size == scene.size for f in found]),
        "direction": direction == scene.direction,
        "speed": speed == scene.speed,
    }


def _vote(names: list[str]) -> str:
    return Counter(names).most_common(1)[0][0]


def _motion(found: list[list[DetectedObject]]) -> tuple[str, str]:
    """(direction, speed) of the largest object; ("", "") where it is not visible at either end."""
    count = len(found)
    points = [(i / max(count - 1, 1), f[0].x, f[0].y) for i, f in enumerate(found) if f]
    if len(points) < max(2, count // 2):
        return "", ""
    t, x, y = (np.array(column) for column in zip(*points))
    dx, dy = float(np.polyfit(t, x, 1)[0]), float(np.polyfit(t, y, 1)[0])
    distance = float(np.hypot(dx, dy))
    if distance < STILL_RADIUS:
        return "still", "still"
    moving = [name for name, (u, v) in DIRECTIONS.items() if (u, v) != (0, 0)]
    direction = max(moving, key=lambda name: dx * DIRECTIONS[name][0] + dy * DIRECTIONS[name][1])
    speeds = {name: length for name, (_, length) in SPEEDS.items() if name != "still"}
    return direction, min(speeds, key=lambda name: abs(speeds[name] - distance))
