"""Fills: textures whose period is 8 pixels at every size of the canvas, and their reading from pixels.

A fill makes detail measurable. An image generated at twice the size has a period of 8 pixels; one that was enlarged
has 16. The phase is random, so that nothing but the spectrum tells the fill.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

FILLS = ("plain", "striped", "barred", "dotted")  # stripes run across, bars upright
PERIOD = 8.0  # pixels
PERIOD_TOLERANCE = 1.5
DEPTH = 0.4  # of the color, taken away where a fill is darkest
VISIBLE = 0.05  # amplitude over the mean brightness from which a wave is a fill
LONE = 2.0  # an axis with so many times the amplitude of the other is alone: stripes or bars, no dots
PERIODS = np.geomspace(4.0, 28.0, 48)


@dataclass(frozen=True)
class Fill:
    """What a region is filled with: one of ``FILLS`` and its period in pixels, 0 for ``plain``."""

    kind: str
    period: float

    @property
    def period_is_right(self) -> bool:
        """Tell whether the period is the world's; a plain fill has none to be wrong."""
        return self.kind == "plain" or abs(self.period - PERIOD) <= PERIOD_TOLERANCE


def shade(kinds: torch.Tensor, phase: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Compute the factor on an object's color in every pixel: (N, height, width) in [1 - ``DEPTH``, 1].

    Args:
        kinds: (N,) int64 index into ``FILLS``.
        phase: (N, 2) of the waves along x and y, in periods.
    """
    device = kinds.device
    across = _wave(torch.arange(width, device=device) / PERIOD + phase[:, :1])[:, None, :]
    down = _wave(torch.arange(height, device=device) / PERIOD + phase[:, 1:])[:, :, None]
    on = kinds[:, None, None]
    dark = torch.where((on == 1) | (on == 3), down, 1.0) * torch.where(on >= 2, across, 1.0)
    return 1 - DEPTH * torch.where(on == 0, 0.0, dark)


def _wave(periods: torch.Tensor) -> torch.Tensor:
    return 0.5 - 0.5 * torch.cos(2 * math.pi * periods)


def read_fill(pixels: np.ndarray, core: np.ndarray) -> Fill:
    """Read the fill of a region of any outline by a periodogram of irregular samples (Lomb 1976; Scargle 1982).

    One wave along x and one along y of a common period are fitted to the brightness, next to a plane.

    Args:
        pixels: (H, W, 3).
        core: (H, W) bool, the inside of the object without its edge.
    """
    rows, columns = np.nonzero(core)
    if len(rows) < 3 * 7:  # of the 7 coefficients
        return Fill("plain", 0.0)
    bright = pixels[rows, columns].mean(-1).astype(np.float64)
    y, x = rows - rows.mean(), columns - columns.mean()
    span = max(np.ptp(rows), np.ptp(columns)) + 1
    periods = PERIODS[1.3 * span >= PERIODS]
    if not len(periods):
        return Fill("plain", 0.0)
    turn_x, turn_y = (2 * np.pi * axis / periods[:, None] for axis in (x, y))
    plane = np.broadcast_to(np.stack([np.ones_like(x), x / span, y / span]), (len(periods), 3, len(x)))
    waves = np.stack([np.cos(turn_x), np.sin(turn_x), np.cos(turn_y), np.sin(turn_y)], 1)
    basis = np.concatenate([plane, waves], 1)
    gram = basis @ basis.transpose(0, 2, 1) + 1e-3 * len(x) * np.diag([0, 0, 0, 1, 1, 1, 1])
    weights = np.linalg.solve(gram, (basis @ bright)[..., None])[..., 0]
    errors = np.square(bright - np.einsum("pk,pkn->pn", weights, basis)).sum(1)
    best = int(errors.argmin())
    along_x, along_y = np.hypot(weights[best, 3::2], weights[best, 4::2]) / max(float(bright.mean()), 1e-6)
    if max(along_x, along_y) < VISIBLE:
        return Fill("plain", 0.0)
    kind = "striped" if along_y > LONE * along_x else "barred" if along_x > LONE * along_y else "dotted"
    return Fill(kind, float(periods[best]))
