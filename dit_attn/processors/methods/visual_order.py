"""The order of visual tokens that a sparse method asks for by name."""

from __future__ import annotations

from dit_attn.errors import DitAttnError
from dit_attn.kernels.layouts.token_order import exact_box
from dit_attn.processors.core.token_permute import Grid
from dit_attn.processors.core.tokens import Tokens

ORDERS = ("auto", "hilbert", "tiles", "none")
"""``hilbert`` curve, ``tiles`` (boxes), ``none`` (row-major), or ``auto``: ``tiles`` where a box of as many tokens as a
key block divides the grid, else ``hilbert``."""


def visual_order(tokens: Tokens, order: str, tile: tuple[int, ...] | None, kv_block: int) -> tuple[str, Grid | None]:
    """Return the name of the token order for a sequence, and the box of ``tiles``.

    Args:
        tokens: the resolved sequence.
        order: of :data:`ORDERS`.
        tile: (t, h, w) tokens of a box; ``None`` for the most compact one that divides the grid, or the default.
        kv_block: tokens per key block.
    """
    if order not in ("auto", "tiles"):
        return order, None
    if tile is not None:
        return "tiles", (tile[0], tile[1], tile[2])
    boxes = {None if span.grid is None else exact_box(span.grid, kv_block) for span in tokens.visual}
    box = boxes.pop() if len(boxes) == 1 else None
    return ("hilbert", None) if order == "auto" and box is None else ("tiles", box)


def check_tile(slug: str, tile: tuple[int, ...] | None) -> None:
    """Check the sizes of a box.

    Raises:
        DitAttnError: they are not three positive ones.
    """
    if tile is not None and (len(tile) != 3 or min(tile) < 1):
        raise DitAttnError(f"{slug}.tile must be three positive sizes (t, h, w), got {tile}")
