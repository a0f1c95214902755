"""Drawings of layouts: every pair in the color of what is done with it, and the documentation's image is up to date."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dit_attn.kernels import BlockLayout, inward_window
from dit_attn.kernels.layouts import draw

IMAGE = Path(__file__).parents[3] / "docs" / "images" / "layouts.png"


def colors(image: Image.Image, layout: BlockLayout, scale: int) -> torch.Tensor:
    """(Sq, Sk, 3): the color of every pair, at its last pixel, which is on no line of the grid."""
    pixels = torch.from_numpy(np.array(image))
    assert pixels.shape == (layout.q_len * scale, layout.kv_len * scale, 3)
    return pixels[scale - 2 :: scale, scale - 2 :: scale]


def test_a_pair_has_the_color_of_what_is_done_with_it() -> None:
    layout = inward_window((6, 6), 3, q_block=8, kv_block=8, text_after=4)
    found = colors(draw.draw(layout, scale=4), layout, 4)
    attended, computed = layout.materialize()[0, 0], layout.block_mask()[0, 0]
    for row in range(layout.q_len):
        for column in range(layout.kv_len):
            at = row // 8, column // 8
            full = bool(layout.full_mask()[0, 0][at])
            expected = draw._FULL if full else draw._ALLOWED if attended[row, column] else draw._MASKED
            if not computed[at]:
                expected = draw._SKIPPED
            assert tuple(found[row, column].tolist()) == expected


def test_the_image_of_the_documentation_shows_the_layouts_as_they_are_built() -> None:
    layouts = draw.documented_layouts()
    shown, drawn = (image.convert("RGB") for image in (Image.open(IMAGE), draw.contact_sheet(layouts)))
    assert shown.size == drawn.size
    # Captions are left out: their font is that of the installed Pillow.
    inks = torch.tensor([draw._FULL, draw._ALLOWED, draw._MASKED])
    shown, drawn = ((torch.from_numpy(np.array(image)).int()[:, :, None] == inks).all(-1) for image in (shown, drawn))
    assert bool((shown == drawn).all()) and bool(drawn.flatten(0, 1).any(0).all())


def test_the_window_of_the_image_computes_less_in_tiles_and_nothing_partial_when_snapped() -> None:
    layouts = draw.documented_layouts()
    rows, tiles, snapped = (layouts[name] for name in layouts if "row-major" in name or name.endswith("4 x 4"))
    assert rows.density > 1.5 * tiles.density > 2 * snapped.density
    assert rows.token_density == tiles.token_density and snapped.elements is None
