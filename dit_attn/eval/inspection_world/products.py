"""Products of the inspection world: brushed metal, woven fabric, granite and a hexagonal nut, drawn from a seed.

A product is drawn as ``(image, foreground)``: (H, W, 3) float64 in [0, 1] and (H, W) bool, ``True`` where a defect may
lie. Lengths are fractions of the canvas, so that a larger canvas shows the same piece in more detail.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Rng = np.random.Generator
Drawn = tuple[np.ndarray, np.ndarray]


def grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Compute the (y, x) centers of the pixels as fractions of the canvas, (size, 1) and (1, size)."""
    axis = (np.arange(size) + 0.5) / size
    return axis[:, None], axis[None, :]


def smooth_noise(rng: Rng, size: int, *, length: float, stretch: float = 1.0, base: int = 128) -> np.ndarray:
    """Draw Gaussian noise of unit variance, smoothed over ``length``; periodic.

    The same random numbers are used at every size up to ``base``, so that sizes show the same noise.

    Args:
        rng: random numbers.
        size: height and width in pixels.
        length: standard deviation of the smoothing along y, as a fraction of the canvas.
        stretch: of the smoothing along x, as a multiple of ``length``.
        base: pixels of the grid on which the noise is drawn.
    """
    base = max(base, size)
    spectrum = np.fft.rfft2(rng.standard_normal((base, base)))
    fy = np.fft.fftfreq(base)[:, None] * base
    fx = np.fft.rfftfreq(base)[None, :] * base
    spectrum *= np.exp(-2 * np.pi**2 * length**2 * (fy**2 + (stretch * fx) ** 2))
    noise = np.fft.irfft2(spectrum, s=(base, base))
    noise = shrink(noise, size)
    return (noise - noise.mean()) / (noise.std() + 1e-12)


def shrink(image: np.ndarray, size: int) -> np.ndarray:
    """Reduce a square image to ``size`` by averaging where it divides, else by the nearest pixels."""
    base = len(image)
    if base % size == 0:
        k = base // size
        return image.reshape(size, k, size, k, *image.shape[2:]).mean((1, 3))
    rows = (np.arange(size) * base) // size
    return image[rows][:, rows]


def _tinted(gray: np.ndarray, color: tuple[float, float, float], rng: Rng) -> np.ndarray:
    """Give a gray relief around 1 a color, and vary brightness and hue a little."""
    shade = np.array(color) * (1 + rng.uniform(-0.08, 0.08)) * (1 + rng.uniform(-0.015, 0.015, 3))
    return gray[..., None] * shade


def metal(rng: Rng, size: int) -> Drawn:
    """Draw brushed metal: noise stretched along x under a light that falls off to one side."""
    y, x = grid(size)
    brush = smooth_noise(rng, size, length=0.006, stretch=12)
    wide = smooth_noise(rng, size, length=0.03, stretch=8)
    angle = rng.uniform(0, 2 * np.pi)
    light = 1 + 0.10 * ((x - 0.5) * np.cos(angle) + (y - 0.5) * np.sin(angle))
    gray = (1 + 0.055 * brush + 0.03 * wide) * light
    return _tinted(gray, (0.60, 0.62, 0.66), rng), np.ones((size, size), bool)


def weave(rng: Rng, size: int) -> Drawn:
    """Draw a plain weave: threads along x and y that pass over and under each other."""
    y, x = grid(size)
    count = 8
    wobble = 0.006 * smooth_noise(rng, size, length=0.12)
    u, v = (x + wobble) * count + rng.uniform(), (y + wobble.T) * count + rng.uniform()
    warp, weft = np.abs(np.sin(np.pi * u)), np.abs(np.sin(np.pi * v))
    over = (np.floor(u) + np.floor(v)) % 2 == 0
    relief = np.where(over, warp * (0.65 + 0.35 * weft), weft * (0.65 + 0.35 * warp))
    gray = 0.62 + 0.5 * relief + 0.04 * smooth_noise(rng, size, length=0.01)
    return _tinted(gray, (0.42, 0.52, 0.70), rng), np.ones((size, size), bool)


def granite(rng: Rng, size: int) -> Drawn:
    """Draw granite: dark and light grains on a gray ground."""
    coarse = smooth_noise(rng, size, length=0.022)
    fine = smooth_noise(rng, size, length=0.011)
    gray = 1 + 0.07 * coarse + 0.05 * fine
    gray = gray - 0.22 * _step(fine + 0.5 * coarse - 1.3) + 0.18 * _step(-fine + 0.4 * coarse - 1.5)
    return _tinted(gray, (0.60, 0.54, 0.51), rng), np.ones((size, size), bool)


def nut(rng: Rng, size: int) -> Drawn:
    """Draw a hexagonal brass nut with a bore, turned at random, on a dark table; only the nut is foreground."""
    y, x = grid(size)
    cx, cy = 0.5 + rng.uniform(-0.03, 0.03, 2)
    turn, radius, bore = rng.uniform(0, np.pi / 3), 0.40, 0.15
    dx, dy = x - cx, y - cy
    sides = [dx * np.cos(turn + k * np.pi / 3) + dy * np.sin(turn + k * np.pi / 3) for k in range(6)]
    outer = np.max(sides, axis=0) - radius
    r = np.hypot(dx, dy)
    inner = bore - r
    distance = np.maximum(outer, inner)
    cover = np.clip(0.5 - distance * size, 0, 1)
    side = np.argmax(sides, axis=0)
    bevel = _step((outer + 0.05) / 0.01) * 0.16 * np.cos(turn + side * np.pi / 3 + 2.2)
    rim = 0.12 * np.exp(-(((r - bore - 0.02) / 0.012) ** 2))
    gray = 1 + bevel + rim + 0.035 * smooth_noise(rng, size, length=0.01)
    brass = _tinted(gray, (0.76, 0.62, 0.33), rng)
    table = _tinted(1 + 0.05 * smooth_noise(rng, size, length=0.02), (0.16, 0.17, 0.19), rng)
    image = table + cover[..., None] * (brass - table)
    return image, distance < -0.02


def _step(value: np.ndarray) -> np.ndarray:
    """Smooth step from 0 to 1 around 0."""
    return 1 / (1 + np.exp(-np.clip(6 * value, -30, 30)))


PRODUCTS: dict[str, Callable[[Rng, int], Drawn]] = {"metal": metal, "weave": weave, "granite": granite, "nut": nut}
