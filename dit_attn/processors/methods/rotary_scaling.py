"""Positions of a grid larger than the native one: interpolated, by frequency, or by frequency and time step."""

from __future__ import annotations

from dit_attn.processors.core.positions import PositionMap
from dit_attn.processors.methods.base import Grid

KINDS = ("plain", "interpolated", "ntk", "yarn", "dype")
_BANDS = {"interpolated": "all", "ntk": "ntk", "yarn": "yarn", "dype": "ntk"}


def scaled_positions(kind: str, grid: Grid, native: tuple[int, int], noise: float) -> PositionMap | None:
    """Place the tokens of a larger grid within the range of the native one; ``None`` where nothing moves.

    Args:
        kind: of :data:`KINDS`. ``dype`` scales with the power 2 t^2 of the time t (arXiv 2510.20766).
        grid: (T, H, W) tokens.
        native: (h, w) tokens that the model was trained at.
        noise: time in [0, 1], 1 at the first step.
    """
    if kind == "plain":
        return None
    h, w = (min(1.0, ours / size) for ours, size in zip(native, grid[1:], strict=True))
    if kind == "dype":
        h, w = (scale ** (2.0 * noise**2) for scale in (h, w))
    if (h, w) == (1.0, 1.0):
        return None
    lengths = (float(grid[0]), float(native[0]), float(native[1]))
    return PositionMap(scale=(1.0, h, w), bands=_BANDS[kind], native=lengths)
