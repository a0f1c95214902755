"""Defects of the inspection world: how each type changes a product, drawn from a seed.

A defect is drawn as ``(paint, alpha)``: the defective surface (H, W, 3) and its coverage (H, W) in [0, 1]. Lengths are
fractions of the canvas.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np

from dit_attn.eval.inspection_world.products import Rng, grid, smooth_noise

Painted = tuple[np.ndarray, np.ndarray]


def place(rng: Rng, foreground: np.ndarray, margin: float = 0.14) -> tuple[float, float]:
    """Draw a place (y, x) on the foreground, ``margin`` away from the border of the canvas."""
    size = len(foreground)
    edge = round(margin * size)
    inside = np.zeros_like(foreground)
    inside[edge : size - edge, edge : size - edge] = True
    rows, columns = np.nonzero(foreground & inside)
    pick = int(rng.uniform() * len(rows))
    return (rows[pick] + 0.5) / size, (columns[pick] + 0.5) / size


def line_distance(points: np.ndarray, size: int) -> np.ndarray:
    """Compute the distance of every pixel to a line through ``points``, (N, 2) as (y, x): (size, size)."""
    y, x = grid(size)
    best = np.full((size, size), np.inf)
    for (y0, x0), (y1, x1) in pairwise(points):
        dy, dx = y1 - y0, x1 - x0
        t = np.clip(((y - y0) * dy + (x - x0) * dx) / (dy * dy + dx * dx + 1e-12), 0, 1)
        best = np.minimum(best, np.hypot(y - y0 - t * dy, x - x0 - t * dx))
    return best


def _line(rng: Rng, start: tuple[float, float], length: float, bend: float, steps: int = 10) -> np.ndarray:
    """Draw a line of ``length`` whose middle is ``start`` and whose direction turns by about ``bend`` in all."""
    angles = rng.uniform(0, 2 * np.pi) + np.cumsum(rng.normal(0, bend / steps**0.5, steps))
    moves = np.stack([np.sin(angles), np.cos(angles)], 1) * (length / steps)
    points = np.concatenate([np.zeros((1, 2)), np.cumsum(moves, 0)])
    return points - points[steps // 2] + np.array(start)


def _covered(distance: np.ndarray, half_width: float) -> np.ndarray:
    """Coverage of a line, anti-aliased over a pixel."""
    return np.clip((half_width - distance) * len(distance) + 0.5, 0, 1)


def scratch(rng: Rng, surface: np.ndarray, foreground: np.ndarray) -> Painted:
    """Draw a bright, slightly bent line."""
    size = len(surface)
    points = _line(rng, place(rng, foreground), rng.uniform(0.35, 0.6), 0.25)
    alpha = _covered(line_distance(points, size), rng.uniform(0.013, 0.022))
    bright = np.array([0.95, 0.95, 0.93]) * (1 + rng.uniform(-0.04, 0.04))
    return np.broadcast_to(bright, surface.shape), 0.92 * alpha


def crack(rng: Rng, surface: np.ndarray, foreground: np.ndarray) -> Painted:
    """Draw a dark jagged line with one branch."""
    size = len(surface)
    points = _line(rng, place(rng, foreground), rng.uniform(0.4, 0.65), 1.6, steps=9)
    branch = _line(rng, (0.0, 0.0), rng.uniform(0.12, 0.22), 0.8, steps=4)
    branch = branch - branch[0] + points[int(rng.integers(3, 7))]
    distance = np.minimum(line_distance(points, size), line_distance(branch, size))
    alpha = _covered(distance, rng.uniform(0.011, 0.017))
    return surface * 0.2, 0.95 * alpha


def _blob(rng: Rng, center: tuple[float, float], radius: float, rough: float, size: int) -> np.ndarray:
    """Signed distance to a blob, negative inside: a disk whose radius varies with the direction."""
    y, x = grid(size)
    dy, dx = y - center[0], x - center[1]
    angle = np.arctan2(dy, dx)
    edge = np.full_like(angle, radius)
    for wave in range(2, 6):
        edge = edge + radius * rough / wave * rng.normal() * np.cos(wave * angle + rng.uniform(0, 2 * np.pi))
    return np.hypot(dy, dx) - edge


def hole(rng: Rng, surface: np.ndarray, foreground: np.ndarray) -> Painted:
    """Draw a nearly round dark hole with a soft rim."""
    size = len(surface)
    distance = _blob(rng, place(rng, foreground), rng.uniform(0.06, 0.10), 0.12, size)
    alpha = np.clip(0.5 - distance * size / 2, 0, 1)
    return np.broadcast_to(np.array([0.05, 0.045, 0.04]), surface.shape), alpha


def stain(rng: Rng, surface: np.ndarray, foreground: np.ndarray) -> Painted:
    """Draw an irregular brown stain through which the surface shows."""
    size = len(surface)
    distance = _blob(rng, place(rng, foreground), rng.uniform(0.10, 0.17), 0.35, size)
    distance = distance + 0.02 * smooth_noise(rng, size, length=0.05)
    alpha = np.clip(0.5 - distance * size / 3, 0, 1)
    return surface * np.array([0.62, 0.42, 0.24]), 0.95 * alpha


def contamination(rng: Rng, surface: np.ndarray, foreground: np.ndarray) -> Painted:
    """Draw a group of small green particles."""
    size = len(surface)
    y, x = grid(size)
    cy, cx = place(rng, foreground)
    alpha = np.zeros((size, size))
    for _ in range(int(rng.integers(5, 10))):
        py, px = cy + rng.normal(0, 0.06), cx + rng.normal(0, 0.06)
        radius, turn, flat = rng.uniform(0.018, 0.032), rng.uniform(0, np.pi), rng.uniform(0.6, 1.0)
        u = (x - px) * np.cos(turn) + (y - py) * np.sin(turn)
        v = (y - py) * np.cos(turn) - (x - px) * np.sin(turn)
        alpha = np.maximum(alpha, np.clip((radius - np.hypot(u, v / flat)) * size + 0.5, 0, 1))
    return np.broadcast_to(np.array([0.20, 0.62, 0.22]) * (1 + rng.uniform(-0.1, 0.1)), surface.shape), 0.95 * alpha


DEFECTS: dict[str, Callable[[Rng, np.ndarray, np.ndarray], Painted]] = {
    "scratch": scratch,
    "hole": hole,
    "stain": stain,
    "crack": crack,
    "contamination": contamination,
}
