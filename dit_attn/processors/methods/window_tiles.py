"""The tiles that windows are computed in: which ones divide a grid, and whether windows move to their borders."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch

from dit_attn.errors import DitAttnError
from dit_attn.kernels import BlockLayout, inward_window, snapped_window, token_order, window_tile
from dit_attn.processors.methods.base import Grid


@dataclass(frozen=True)
class WindowTiles:
    """How a window is cut into blocks.

    Attributes:
        snap: ``yes``, ``no``, or ``auto``: on CPUs, where tiles divide the grid and are at most half as long as it is.
        tile: (t, h, w) of a tile; ``None`` for the best one that divides the grid.
        q_block: tokens per block of queries, at most.
        kv_block: tokens per tile where ``tile`` does not say, at most.
        inward: whether the window moves inward at a border; else it is cut off there.
        full_blocks: what stands for the keys outside needs blocks that are full or skipped.
    """

    snap: str
    tile: Grid | None
    q_block: int
    kv_block: int
    inward: bool = True
    full_blocks: bool = False

    def layout(
        self, grid: Grid, window: Grid, others: int = 0, device: torch.device | str = "cpu"
    ) -> tuple[BlockLayout, Grid | None]:
        """Return the layout of the visual rows in tile order, and the tile; ``None`` for the default one.

        Args:
            grid: (T, H, W) visual tokens.
            window: (t, h, w) of the window.
            others: tokens of the sequence that are not visual; all rows attend to them.
            device: where the lists are.

        Raises:
            DitAttnError: ``snap="yes"``, and no tile divides the grid.
        """
        tile, snapped = _tile_of(self, grid, window, torch.device(device).type)
        order = token_order("tiles", grid, tile=tile)
        kv_block = self.kv_block if tile is None else math.prod(tile)
        q_block = kv_block * self._joined(grid, tile, kv_block)
        if snapped:
            layout = snapped_window(
                grid, window, order=order, q_block=q_block, kv_block=kv_block, text_after=others, text_rows=False,
                device=device,
            )  # fmt: skip
        else:
            layout = inward_window(
                grid, window, order=order, q_block=q_block, kv_block=kv_block, text_after=others, text_rows=False,
                inward=self.inward, device=device,
            )  # fmt: skip
        return layout, tile

    def _joined(self, grid: Grid, tile: Grid | None, kv_block: int) -> int:
        """Tiles of keys per block of queries: as many along a row as ``q_block`` holds and as divide it."""
        if tile is None or grid[2] % tile[2]:
            return 1
        row = grid[2] // tile[2]
        return max(n for n in range(1, row + 1) if row % n == 0 and (n == 1 or n * kv_block <= self.q_block))


@lru_cache(maxsize=256)
def _tile_of(tiles: WindowTiles, grid: Grid, window: Grid, device: str) -> tuple[Grid | None, bool]:
    """The tile of the order, ``None`` for the default one, and whether windows are snapped to it."""
    tile = window_tile(grid, tiles.kv_block) if tiles.tile is None else tiles.tile
    divides = not any(n % side for n, side in zip(grid, tile, strict=True))
    fine = all(side <= max(1, size // 2) or size == n for side, size, n in zip(tile, window, grid, strict=True))
    if tiles.snap == "yes" and not divides:
        raise DitAttnError(f'inward-window.tile {tile} does not divide the grid {grid}; leave it out, or snap="yes"')
    wanted = tiles.snap == "yes" or tiles.full_blocks or (tiles.snap == "auto" and device == "cpu")
    snapped = wanted and divides and tiles.inward and (fine or tiles.snap == "yes")
    return (tile if tiles.tile is not None or snapped or fine else None), snapped
