"""What guidance breaks first: colours stronger than any real picture has, and pixels that belong to nothing.

Both look at pixels only and need no network. Real pictures of the world give 0.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from dit_attn.eval.verify import CONTRAST, MIN_OVERLAP, Thing, as_array, backdrop, regions
from dit_attn.eval.world import BACKGROUNDS, COLOURS

COLOURED = 0.25  # chroma from which a pixel counts as coloured
MARGIN = 0.08  # chroma above the palette's that is still the palette: MP4 rings by as much at an edge
FULL = 0.99  # chroma that is clipped whatever the palette says
OFF_PALETTE = 0.22  # distance in RGB from the nearest colour or background of the world
STRAY = 0.004  # of the canvas: half of what counts as an object

CHROMA = {name: max(rgb) - min(rgb) for name, rgb in COLOURS.items()}


def oversaturated(frames: np.ndarray, dense: np.ndarray | None = None) -> float:
    """Share of the coloured pixels of a picture or clip whose colour is stronger than it should be, in [0, 1].

    The strength of a colour is its chroma, the largest minus the smallest channel in [0, 1]. Of a picture of the world
    no pixel may be stronger than the palette's colour of its hue, which mixing with a grey background only weakens;
    ``MARGIN`` allows for compression, and a chroma of ``FULL`` is always too strong (clipped).

    Args:
        frames: (F, H, W, 3) uint8.
        dense: what to compare with where the world's palette does not apply: no pixel may be stronger than the
            strongest 0.1 % of ``dense`` by ``MARGIN``, and the share that ``dense`` itself has is taken off (so that
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
    coloured = strength >= COLOURED
    return float((coloured & (strength > limit)).sum() / max(coloured.sum(), 1))


def _palette_chroma(frames: np.ndarray) -> np.ndarray:
    """Chroma of the palette entry whose hue is nearest, of every pixel."""
    hue = _hue(frames.astype(np.float64))
    palette = _hue(np.array([COLOURS[name] for name in CHROMA]))
    apart = np.abs(hue[..., None] - palette)
    return np.array(list(CHROMA.values()))[np.minimum(apart, 6.0 - apart).argmin(-1)]


def _hue(colours: np.ndarray) -> np.ndarray:
    """Hue of (..., 3) colours in [0, 6): 0 red, 2 green, 4 blue."""
    red, green, blue = np.moveaxis(colours, -1, 0)
    top, spread = colours.max(-1), np.maximum(colours.max(-1) - colours.min(-1), 1e-9)
    sides = ((green - blue) / spread, 2.0 + (blue - red) / spread, 4.0 + (red - green) / spread)
    return np.select([top == red, top == green], sides[:2], sides[2]) % 6.0


def artifacts(image: Any) -> dict[str, bool]:
    """What in a picture is not of the world.

    Args:
        image: as for ``verify.verify_image``.

    Returns:
        ``colour``: the background, or an object, is farther than ``OFF_PALETTE`` from every colour it could have;
        ``shape``: an object that no shape fits (overlap below ``verify.MIN_OVERLAP``); ``stray``: more than ``STRAY``
        of the picture is neither background nor an object: specks too small for an object, and pixels in an
        object that are not between its colour and the background's.
    """
    pixels = as_array(image)
    found, ground = regions(pixels), backdrop(pixels)
    off = [_distance(np.array(thing.rgb), COLOURS) for thing, _ in found] + [_distance(ground, BACKGROUNDS)]
    return {
        "colour": max(off) > OFF_PALETTE,
        "shape": any(thing.overlap < MIN_OVERLAP for thing, _ in found),
        "stray": float(_stray(pixels, found, ground).mean()) > STRAY,
    }


def artifact_rate(frames: Any) -> float:
    """Share of the frames of a picture or clip, (F, H, W, 3) uint8, in which :func:`artifacts` finds anything."""
    return float(np.mean([any(artifacts(frame).values()) for frame in frames]))


def _distance(rgb: np.ndarray, palette: dict[str, tuple[float, float, float]]) -> float:
    return min(float(np.linalg.norm(rgb - np.array(entry))) for entry in palette.values())


def _stray(pixels: np.ndarray, found: list[tuple[Thing, np.ndarray]], ground: np.ndarray) -> np.ndarray:
    """(H, W) bool: pixels that belong to neither the background nor an object."""
    from scipy import ndimage

    sigma = max(1.0, len(pixels) / 128)
    soft = ndimage.gaussian_filter(pixels, sigma=(sigma, sigma, 0))  # noise is not stray
    stray = np.linalg.norm(soft - ground, axis=-1) > CONTRAST
    for thing, region in found:
        near = ndimage.binary_dilation(region, iterations=math.ceil(2 * sigma))
        stray &= ~(near & (_off_line(soft, ground, np.array(thing.rgb)) <= CONTRAST))
    return stray


def _off_line(pixels: np.ndarray, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """(H, W): distance of every colour from the line of mixtures of two colours."""
    way = other - one
    share = ((pixels - one) @ way / max(float(way @ way), 1e-9)).clip(0.0, 1.0)
    return np.linalg.norm(pixels - one - share[..., None] * way, axis=-1)
