"""Windowed attention on square images compared with torch's dense attention, fp32, each in turn with a dense call."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from dit_attn.kernels.benchmark.timing import timed
from dit_attn.kernels.functional import sparse_attention
from dit_attn.kernels.layouts.block_layout import BlockLayout
from dit_attn.kernels.layouts.token_order import token_order
from dit_attn.kernels.layouts.windows import inward_window, snapped_window

SIDES = (64, 96, 128)
WINDOW = 32
TILE = (1, 8, 8)


@dataclass(frozen=True)
class WindowRow:
    """One kind of window on one grid.

    Attributes:
        kind: ``snapped``, ``exact`` (in tile order) or ``row-major`` (exact).
        side: tokens along each side of the image.
        density: computed tiles over all tiles.
        dense_ms, window_ms: medians.
        ratio: median over the rounds of window over dense, the two timed one after the other.
        ratios: of all rounds.
    """

    kind: str
    side: int
    density: float
    dense_ms: float
    window_ms: float
    ratio: float
    ratios: list[float]


def window_layouts(side: int, window: int) -> dict[str, BlockLayout]:
    """Return the layouts that are compared: query tiles of two key tiles of 8 x 8, and row-major blocks of 128."""
    order = token_order("tiles", (side, side), tile=TILE)
    return {
        "snapped": snapped_window((side, side), window, order=order, q_block=128, kv_block=64),
        "exact": inward_window((side, side), window, order=order, q_block=128, kv_block=64),
        "row-major": inward_window((side, side), window),
    }


def measure_windows(side: int, window: int, heads: int, dim: int, batch: int, repeats: int) -> list[WindowRow]:
    """Time every window next to a dense call, on noise; a first round is discarded.

    Args:
        side: tokens along each side of the image, a multiple of 16.
        window: tokens along each side of the window.
        heads, dim, batch: sizes of the call.
        repeats: rounds; every round times every window and a dense call before each.
    """
    torch.manual_seed(0)
    cpu = torch.device("cpu")
    q, k, v = torch.randn(3, batch, side * side, heads, dim)
    dense: Callable[[], torch.Tensor] = partial(F.scaled_dot_product_attention, *(x.transpose(1, 2) for x in (q, k, v)))
    layouts = window_layouts(side, window)
    times: dict[str, list[tuple[float, float]]] = {kind: [] for kind in layouts}
    with torch.no_grad():
        for _ in range(repeats + 1):
            for kind, layout in layouts.items():
                before = timed(dense, cpu)
                times[kind].append((before, timed(partial(sparse_attention, q, k, v, layout), cpu)))
    rows = []
    for kind, found in times.items():
        ratios = [ours / before for before, ours in found[1:]]
        before, ours = (statistics.median(pair[i] for pair in found[1:]) for i in range(2))
        rows.append(WindowRow(kind, side, layouts[kind].density, before, ours, statistics.median(ratios), ratios))
    return rows
