"""Shapes of masks, in figures: how large, how long, how rough, and how near to given ones."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import ndimage, stats

from dit_attn.pipelines.anomaly.masks import boxed, spread

SHIFT = 2  # pixels by which two masks are moved to lie on each other


def describe(mask: np.ndarray) -> dict[str, float]:
    """Measure a mask, (H, W) bool: area in pixels, elongation, roughness and number of parts.

    Elongation is the ratio of the standard deviations of the pixels along the two main axes; roughness is the number of
    pixels on the edge over that of a disk of the same area.
    """
    across, along = spread(mask)
    padded = np.pad(mask, 1)
    edge = (padded & ~ndimage.binary_erosion(padded)).sum()
    area = float(mask.sum())
    _, parts = ndimage.label(mask, np.ones((3, 3)))
    return {"area": area, "elongation": along / across, "roughness": float(edge / np.sqrt(4 * np.pi * area)),
            "number of parts": float(parts)}  # fmt: skip


def distance(first: Sequence[float], second: Sequence[float]) -> float:
    """Return the Kolmogorov-Smirnov distance of two samples: 0 for equal distributions, 1 for disjoint ones."""
    return float(stats.ks_2samp(first, second).statistic)


def nearest_overlap(mask: np.ndarray, shapes: Sequence[np.ndarray]) -> float:
    """Return the largest intersection over union with one of ``shapes``, mirrored or not and moved onto it."""
    flips = [shape[::rows, ::columns] for shape in shapes for rows in (1, -1) for columns in (1, -1)]
    return max(_overlap(boxed(mask), boxed(shape)) for shape in flips)


def _overlap(first: np.ndarray, second: np.ndarray) -> float:
    size = [max(pair) + 2 * SHIFT for pair in zip(first.shape, second.shape)]
    one = _centered(first, size)
    other = _centered(second, size)
    best = 0.0
    for down in range(-SHIFT, SHIFT + 1):
        for across in range(-SHIFT, SHIFT + 1):
            moved = np.roll(other, (down, across), (0, 1))
            best = max(best, float((one & moved).sum() / (one | moved).sum()))
    return best


def _centered(mask: np.ndarray, size: Sequence[int]) -> np.ndarray:
    out = np.zeros(tuple(size), bool)
    top, left = ((total - length) // 2 for total, length in zip(size, mask.shape))
    out[top : top + mask.shape[0], left : left + mask.shape[1]] = mask
    return out
