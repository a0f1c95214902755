"""What guidance breaks first: colors stronger than any real image has, and pixels that belong to nothing.

Both look at pixels only and need no network. Real images of the world give 0.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from dit_attn.eval.shapes_world.verify import CONTRAST, MIN_OVERLAP, DetectedObject, as_array, backdrop, segment
from dit_attn.eval.shapes_world.world import BACKGROUNDS, COLORS

COLORED = 0.25  # chroma from which a pixel counts as colored
MARGIN = 0.08  # chroma above the palette's that is still the palette: MP4 rings by as much at an edge
FULL = 0.99  # chroma that is clipped whatever the palette says
OFF_PALETTE = 0.22  # distance in RGB from the nearest color or background of the world
STRAY = 0.004  # of the canvas: half of what counts as an object

CHROMA = {name: max(rgb) - min(rgb) for name, rgb in COLORS.items()}


def oversaturated(frames: np.ndarray, dense: np.ndarray | None = None) -> float:
    """Measure the share of colored pixels of an image or video whose color is too strong, in [0, 1].

    The strength of a color is its chroma, the largest minus the smallest channel in [0, 1]. In an image of the world
    no pixel may be stronger than the palette's color of its hue, which mixing with a gray background only weakens;
    ``MARGIN`` allows for compression, and a chroma of ``FULL`` is always too strong (clipped).

    Args:
        frames: (F, H, W, 3) uint8.
        dense: what to compare with where the world's palette does not apply: no pixel may be stronger than the
            strongest 0.1 % of ``dense`` by ``MARGIN``, and the share that ``dense`` itself has is subtracted (so that
            the result is 0 for ``dense`` itself, and may be negative where it is clipped).
    """
    strength = _chroma(frames)
    if dense is None:
        limit = np.minimum(_palette_chroma(frames) + MARGIN, FULL)
        return _share_above(strength, limit)
    usual = _chroma(dense)
    bound = np.minimum(np.quantile(usual, 0.999) + MARGIN, FULL)
    return _share_above(strength, bound) - _share_above(usual, bound)


def _chroma(frames: np.ndarray) -> np.ndarray:
    return (frames.max(-1).astype(np.float64) - frames.min(-1)) / 255.0


def _share_above(strength: np.ndarray, limit: Any) -> float:
    colored = strength >= COLORED
    return float((colored & (strength > limit)).sum() / max(colored.sum(), 1))


def _palette_chroma(frames: np.ndarray) -> np.ndarray:
    """Chroma of the palette entry whose hue is nearest, of every pixel."""
    hue = _hue(frames.astype(np.float64))
    palette = _hue(np.array([COLORS[name] for name in CHROMA]))
    apart = np.abs(hue[..., None] - palette)
    return np.array(list(CHROMA.values()))[np.minimum(apart, 6.0 - apart).argmin(-1)]


def _hue(colors: np.ndarray) -> np.ndarray:
    """Hue of (..., 3) colors in [0, 6): 0 red, 2 green, 4 blue."""
    red, green, blue = np.moveaxis(colors, -1, 0)
    top, spread = colors.max(-1), np.maximum(colors.max(-1) - colors.min(-1), 1e-9)
    sides = ((green - blue) / spread, 2.0 + (blue - red) / spread, 4.0 + (red - green) / spread)
    return np.select([top == red, top == green], sides[:2], sides[2]) % 6.0


def artifacts(image: Any) -> dict[str, bool]:
    """Find what in an image is not of the world.

    Args:
        image: as for ``verify.verify_image``.

    Returns:
        ``color``: the background, or an object, is farther than ``OFF_PALETTE`` from every color it could have;
        ``shape``: an object that no shape fits (overlap below ``verify.MIN_OVERLAP``); ``stray``: more than ``STRAY``
        of the image is neither background nor an object: specks too small for an object, and pixels in an
        object that are not between its color and the background's.
    """
    pixels = as_array(image)
    found, ground = segment(pixels), backdrop(pixels)
    off = [_distance(np.array(one.rgb), COLORS) for one, _ in found] + [_distance(ground, BACKGROUNDS)]
    return {
        "color": max(off) > OFF_PALETTE,
        "shape": any(one.overlap < MIN_OVERLAP for one, _ in found),
        "stray": float(_stray(pixels, found, ground).mean()) > STRAY,
    }


def artifact_rate(frames: Any) -> float:
    """Measure the share of frames of an image or video, (F, H, W, 3) uint8, in which :func:`artifacts` finds any."""
    return float(np.mean([any(artifacts(frame).values()) for frame in frames]))


def _distance(rgb: np.ndarray, palette: dict[str, tuple[float, float, float]]) -> float:
    return min(float(np.linalg.norm(rgb - np.array(entry))) for entry in palette.values())


def _stray(pixels: np.ndarray, found: list[tuple[DetectedObject, np.ndarray]], ground: np.ndarray) -> np.ndarray:
    """(H, W) bool: pixels that belong to neither the background nor an object."""
    from scipy import ndimage

    sigma = max(1.0, len(pixels) / 128)
    soft = ndimage.gaussian_filter(pixels, sigma=(sigma, sigma, 0))  # noise is not stray
    stray = np.linalg.norm(soft - ground, axis=-1) > CONTRAST
    for one, region in found:
        near = ndimage.binary_dilation(region, iterations=math.ceil(2 * sigma))
        stray &= ~(near & (_off_line(soft, ground, np.array(one.rgb)) <= CONTRAST))
    return stray


def _off_line(pixels: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """(H, W): distance of every color from the line of mixtures of two colors."""
    way = end - start
    share = ((pixels - start) @ way / max(float(way @ way), 1e-9)).clip(0.0, 1.0)
    return np.linalg.norm(pixels - start - share[..., None] * way, axis=-1)
