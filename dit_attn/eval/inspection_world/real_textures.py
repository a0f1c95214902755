"""Real textures that come with scikit-image, cut into disjoint crops; defects on them are drawn."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from dit_attn.errors import DitAttnError

TEXTURES = ("brick", "grass", "gravel")
"""512 x 512 gray photographs, public domain (CC0)."""
CELL = 128  # pixels of a crop; 16 of them do not overlap


@lru_cache(maxsize=len(TEXTURES))
def _photograph(name: str) -> np.ndarray:
    try:
        from skimage import data
    except ImportError as error:
        raise DitAttnError(f"the texture {name!r} comes with scikit-image; pip install scikit-image") from error
    return getattr(data, name)().astype(np.float64) / 255


def texture(name: str, seed: int, size: int) -> np.ndarray:
    """Cut crop ``seed % 16`` out of a photograph: (size, size, 3) in [0, 1]; crops of other numbers share no pixel.

    Raises:
        DitAttnError: scikit-image is not installed.
    """
    photograph = _photograph(name)
    row, column = divmod(seed % 16, 4)
    cell = photograph[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL]
    index = (np.arange(size) * CELL) // size
    gray = cell[index][:, index] if CELL % size else cell.reshape(size, CELL // size, size, CELL // size).mean((1, 3))
    return np.repeat(gray[..., None], 3, axis=2)
