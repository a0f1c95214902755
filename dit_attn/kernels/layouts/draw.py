"""Drawings of layouts: rows are queries, columns are keys; dark blocks are full, light ones partial.

``python -m dit_attn.kernels.layouts.draw docs/images/layouts.png`` draws the image of the documentation.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dit_attn.contact_sheet import Tile, grid
from dit_attn.kernels.layouts.block_layout import BlockLayout
from dit_attn.kernels.layouts.patterns import band, from_lengths, sink_window
from dit_attn.kernels.layouts.token_order import token_order
from dit_attn.kernels.layouts.windows import inward_window, snapped_window

if TYPE_CHECKING:
    from PIL import Image

_FULL, _ALLOWED, _MASKED, _SKIPPED = (31, 87, 140), (88, 160, 220), (214, 230, 245), (255, 255, 255)
_LINE = (205, 205, 205)


def draw(layout: BlockLayout, batch: int = 0, head: int = 0, scale: int = 3) -> Image.Image:
    """Draw a layout, token by token, with lines between blocks. For short sequences: every pair is evaluated.

    Args:
        layout: the layout.
        batch, head: which of its lists.
        scale: pixels per token.
    """
    from PIL import Image, ImageDraw

    pairs = layout.materialize()[batch, head]
    full, attended = (
        x[batch, head].repeat_interleave(layout.q_block, 0).repeat_interleave(layout.kv_block, 1)[: len(pairs)]
        for x in (layout.full_mask(), layout.block_mask())
    )
    full, attended = full[:, : pairs.shape[1]], attended[:, : pairs.shape[1]]
    kind = torch.where(full, 3, torch.where(pairs, 2, torch.where(attended, 1, 0)))
    colors = torch.tensor([_SKIPPED, _MASKED, _ALLOWED, _FULL], dtype=torch.uint8)[kind]
    size = (pairs.shape[1] * scale, pairs.shape[0] * scale)
    image = Image.fromarray(colors.numpy(), "RGB").resize(size, Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(image)
    for x in range(0, size[0], layout.kv_block * scale):
        pen.line([(x, 0), (x, size[1])], fill=_LINE)
    for y in range(0, size[1], layout.q_block * scale):
        pen.line([(0, y), (size[0], y)], fill=_LINE)
    pen.rectangle([0, 0, size[0] - 1, size[1] - 1], outline=(90, 90, 90))
    return image


def contact_sheet(layouts: dict[str, BlockLayout], columns: int = 3) -> Image.Image:
    """Draw several layouts with their names and densities, about equally large, in a grid of ``columns``."""
    longest = max(layout.kv_len for layout in layouts.values())
    cells = [
        Tile((draw(layout, scale=max(1, round(longest / layout.kv_len))),), name, f"density {layout.density:.2f}")
        for name, layout in layouts.items()
    ]
    return grid([cells[i : i + columns] for i in range(0, len(cells), columns)])


def documented_layouts() -> dict[str, BlockLayout]:
    """Return the layouts of the documentation's image by their captions; the second row is one window three times."""
    blocks: dict[str, Any] = {"q_block": 16, "kv_block": 16}
    sizes: dict[str, Any] = {"q_len": 104, "kv_len": 104, **blocks}
    rng = torch.Generator().manual_seed(0)
    scores = torch.randn(1, 1, 7, 7, generator=rng)
    forced = torch.eye(7, dtype=torch.bool) | (torch.arange(7) == 6)
    grid, window, text = (16, 24), (8, 8), 16
    tiles = token_order("tiles", grid, tile=(1, 4, 4))
    return {
        "from_topk(k=3), forced": BlockLayout.from_topk(scores, 3, forced[None, None], **sizes),
        "band(before=20, after=8)": band(104, 104, 20, 8, **blocks),
        "sink_window(sinks=10, window=24)": sink_window(104, 10, 24, **blocks),
        "inward_window, row-major": inward_window(grid, window, text_after=text, **blocks),
        "inward_window, tiles of 4 x 4": inward_window(grid, window, order=tiles, text_after=text, **blocks),
        "snapped_window, tiles of 4 x 4": snapped_window(grid, window, order=tiles, text_after=text, **blocks),
        "inward_window((4, 5, 5), (3, 3, 3))": inward_window((4, 5, 5), (3, 3, 3), text_after=4, **blocks),
        "inward_window, tiles, stride=4": inward_window(grid, window, order=tiles, stride=4, text_after=text, **blocks),
        "from_lengths([30, 50, 24])": from_lengths(torch.tensor([30, 50, 24]), 104, **blocks),
    }


def main() -> int:
    """Draw the image of the documentation into the file named on the command line."""
    contact_sheet(documented_layouts()).save(Path(sys.argv[1]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
