"""Pieces of the inspection world as image files, laid out as inspection data are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from dit_attn.eval.inspection_world.world import FIRST_HELD_OUT_SEED, Piece, draw


def write_folders(
    folder: Path, product: str, defect: str, *, normals: int, shots: int, size: int = 64, seed: int = 0
) -> tuple[Path, Path, Path]:
    """Draw normal pieces, and defective ones with masks, that tiny-inspect never saw.

    Args:
        folder: gets the folders ``normal``, ``defects`` and ``masks``.
        product, defect: of the pieces.
        normals, shots: how many.
        size: pixels along each side.
        seed: another one draws other pieces.

    Returns:
        The three folders.
    """
    out = folder / "normal", folder / "defects", folder / "masks"
    for one in out:
        one.mkdir(parents=True, exist_ok=True)
    first = FIRST_HELD_OUT_SEED + 1_000_000 * seed
    for i in range(normals):
        save(draw(Piece(product, "", first + i), size).image, out[0] / f"{i:03d}.png")
    for i in range(shots):
        drawn = draw(Piece(product, defect, first + 500_000 + i), size)
        save(drawn.image, out[1] / f"{i:03d}.png")
        save(drawn.mask.astype(np.float32), out[2] / f"{i:03d}_mask.png")
    return out


def save(image: np.ndarray, path: Path) -> None:
    """Write an image (H, W, 3) or a mask (H, W) in [0, 1] as a PNG."""
    Image.fromarray((image * 255).round().astype(np.uint8)).save(path)
