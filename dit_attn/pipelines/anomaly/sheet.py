"""A contact sheet of pairs: the normal image, the mask's outline on the result, and the result."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import ndimage

from dit_attn.contact_sheet import flow, tile
from dit_attn.pipelines.anomaly.pixels import read_image

if TYPE_CHECKING:
    from PIL.Image import Image

_HEIGHT = 160
_OUTLINE = (255, 40, 160)


def outlined(pixels: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Draw the outline of a mask around it: (H, W, 3) uint8, enlarged where the image is small."""
    scale = max(1, _HEIGHT // pixels.shape[0])
    large, wide = (np.repeat(np.repeat(one, scale, 0), scale, 1) for one in (pixels, mask))
    border = ndimage.binary_dilation(wide, iterations=max(1, len(large) // 160)) & ~wide
    large[border] = _OUTLINE
    return large


def contact_sheet(folder: Path, rows: Sequence[dict[str, Any]], heading: str = "") -> Image:
    """Draw rows of a run's manifest.

    Args:
        folder: of the run.
        rows: of ``manifest.jsonl``.
        heading: line at the top.
    """
    cells = []
    for row in rows:
        image, normal = read_image(folder / row["generated"]), read_image(Path(row["source_image"]))
        mask = read_image(folder / row["mask_file"]).max(-1) > 127
        marked = outlined(image, mask)
        scale = marked.shape[0] // image.shape[0]
        others = [np.repeat(np.repeat(one, scale, 0), scale, 1) for one in (normal, image)]
        frames = np.stack([others[0], marked, others[1]])
        note = ", ".join(f"{key} {row['scores'][key]:.2f}" for key in ("ratio", "fill") if key in row["scores"])
        cells.append(tile(frames, f"{row['product']}+{row['defect']} {row['number']}", note, height=_HEIGHT))
    return flow(cells, heading)
