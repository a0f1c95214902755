"""Windowed self attention on a grid (image or video): exact windows in any token order, and windows of full tiles.

Along an axis of N positions with a window of K, the query at p attends to K positions from ``clamp(c - K // 2, 0, N -
K)`` on, where c is p, or with a stride g the center of its group: ``min(g (p // g) + g // 2, N - 1)``. At a border the
window moves inward, so that every query attends to equally many keys: neighborhood attention (Hassani et al.,
arXiv:2204.07143), with a stride its generalized form (arXiv:2504.16922); odd K is FreeSwim's inward window
(arXiv:2511.14712).

The axes are independent of each other: a box of queries and a box of keys touch if they do along every axis, and the
same holds for "all queries attend to all keys". Constructors therefore cut blocks into boxes and compare intervals.
Their work depends on the number of blocks; results are cached by arguments and device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from dit_attn.errors import DitAttnError
from dit_attn.kernels.checks import check_sizes, is_whole
from dit_attn.kernels.layouts.block_layout import BlockLayout, ceil_div
from dit_attn.kernels.layouts.cache import cached
from dit_attn.kernels.layouts.element_masks import FREE, UNLIMITED, WindowMask
from dit_attn.kernels.layouts.token_order import Grid, TokenOrder, token_order

_PAIRS = 1 << 22  # pairs of boxes compared at a time
Sizes = tuple[int | None, ...] | int | None
"""Sizes of a window: one for each axis, or one for all; ``None`` is all of the axis."""


def inward_window(
    grid: tuple[int, ...],
    window: Sizes,
    *,
    order: TokenOrder | None = None,
    stride: tuple[int, ...] | int = 1,
    q_block: int = 128,
    kv_block: int = 128,
    text_before: int = 0,
    text_after: int = 0,
    text_rows: bool = True,
    inward: bool = True,
    device: torch.device | str = "cpu",
) -> BlockLayout:
    """Build the layout of windowed self attention on a grid; at a border the window moves inward.

    Few blocks are partial where a block of the sequence is a compact box of the grid: give the ``order`` its tokens
    are in. With all frames in the window, a tile of all frames does best (:func:`~dit_attn.kernels.window_tile`).

    Args:
        grid: positions along 1 to 3 axes, e.g. (T, H, W).
        window: size along each axis, or one number for all; ``None`` and sizes above that of the axis are all of it.
        order: order of the grid's tokens in the sequence, by default row-major.
        stride: side of the groups of queries that share a window, along each axis, or one number for all.
        q_block, kv_block: tokens per block.
        text_before, text_after: tokens before and after the grid that attend to, and are attended to by, all tokens.
        text_rows: ``False`` leaves text out of the queries; it stays among the keys.
        inward: ``False`` cuts the window off at a border instead of moving it.
        device: where the lists are.

    Raises:
        DitAttnError: a size that is not a positive whole number, another number of axes, or the order of another grid.
    """
    axes, sizes = _grid(grid), _sizes("window", grid, window)
    strides = _sizes("stride", grid, stride)
    if None in strides or not all(is_whole(n, 0) for n in (text_before, text_after)):
        raise DitAttnError(
            f"stride {stride} must be positive whole numbers, text lengths {text_before} and {text_after} whole and "
            "not negative"
        )
    check_sizes(q_block=q_block, kv_block=kv_block)
    text = (text_before, text_after, text_rows)
    order = _order(order, axes)
    return _exact(order, sizes, strides, inward, text, q_block, kv_block, torch.device(device))


def snapped_window(
    grid: tuple[int, ...],
    window: Sizes,
    *,
    order: TokenOrder,
    q_block: int = 128,
    kv_block: int = 128,
    text_after: int = 0,
    text_rows: bool = True,
    device: torch.device | str = "cpu",
) -> BlockLayout:
    """Build the layout of a window of full tiles: no block is partial, every query tile attends to equally many tiles.

    A tile is a block of the sequence. Along an axis with key tiles of b positions, n of them, and query tiles of a
    positions, the query tile from position p on attends to ``m = min(n, ceil(max(K, a) / b))`` key tiles from
    ``clamp(floor((2 p + a - m b) / (2 b)), 0, n - m)`` on: the window of at least K positions around the center of the
    query tile, moved to the next lower border of a tile, and inward where the grid ends. For a = b that is
    :func:`inward_window` on the grid of tiles (as sliding tile attention, arXiv:2502.04507, has it). An even m is one
    tile longer on the low side unless a is an even number of key tiles.

    Args:
        grid, window: as for :func:`inward_window`.
        order: order of the grid's tokens. Its blocks must be boxes of one shape: ``tiles`` with a tile that divides the
            grid and blocks of its tokens (:func:`~dit_attn.kernels.window_tile`), or of whole rows of tiles.
        q_block, kv_block: tokens per tile of queries and of keys.
        text_after, text_rows: text, as for :func:`inward_window`; its blocks are full.
        device: where the lists are.

    Raises:
        DitAttnError: as :func:`inward_window`, and for blocks that are no boxes of one shape.
    """
    axes, sizes = _grid(grid), _sizes("window", grid, window)
    if not is_whole(text_after, 0):
        raise DitAttnError(f"text_after {text_after} must be a whole number, not negative")
    check_sizes(q_block=q_block, kv_block=kv_block)
    order = _order(order, axes)
    return _snapped(order, sizes, text_after, text_rows, q_block, kv_block, torch.device(device))


def _grid(grid: tuple[int, ...]) -> Grid:
    axes = tuple(grid) if isinstance(grid, (tuple, list)) else ()
    if not 1 <= len(axes) <= 3:
        raise DitAttnError(f"a window needs one size for each of 1 to 3 grid axes, got grid {grid}")
    if not all(is_whole(n, 1) for n in axes):
        raise DitAttnError(f"grid {grid} must be positive whole numbers")
    t, h, w = (1,) * (3 - len(axes)) + axes
    return t, h, w


def _sizes(name: str, grid: tuple[int, ...], given: Sizes) -> tuple[int | None, int | None, int | None]:
    """One size for each of three axes; the axes that the grid leaves out have one position."""
    sizes = tuple(given) if isinstance(given, (tuple, list)) else (given,) * len(grid)
    if len(sizes) != len(grid):
        raise DitAttnError(f"{name} needs one size for each of 1 to 3 grid axes, got grid {grid} and {name} {given}")
    if not all(size is None or is_whole(size, 1) for size in sizes):
        raise DitAttnError(f"{name} {given} must be positive whole numbers, for each axis of the grid {grid}")
    a, b, c = (1,) * (3 - len(sizes)) + sizes
    return a, b, c


def _order(order: TokenOrder | None, grid: Grid) -> TokenOrder:
    if order is None:
        return token_order("identity", grid)
    if order.grid != grid:
        raise DitAttnError(f"order must be one of the grid {grid}, got {order!r}; make it with token_order")
    return order


# -- the rule along one axis -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Axis:
    """The windows along one axis of N positions; both ends ascend.

    Attributes:
        size: positions of a window, ``UNLIMITED`` when every window is all of the axis.
        start: (N,) int64, first position of each query's window; negative where the window is cut off.
        stop: (N,) int64, the position after its last one, at most N.
    """

    size: int
    start: torch.Tensor
    stop: torch.Tensor

    def touches(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """(q, k) bool: some query of an interval attends to some key of another; first and last positions (n, 2)."""
        first = torch.searchsorted(self.stop, k[:, 0].contiguous(), right=True)  # the first query that sees so far
        last = torch.searchsorted(self.start, k[:, 1].contiguous(), right=True) - 1
        return torch.maximum(q[:, :1], first) <= torch.minimum(q[:, 1:], last)

    def contains(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """(q, k) bool: all queries of an interval attend to all keys of another."""
        return (self.start[q[:, 1]][:, None] <= k[:, 0]) & (self.stop[q[:, 0]][:, None] > k[:, 1])


def _axis(n: int, window: int | None, stride: int, inward: bool) -> _Axis:
    place = torch.arange(n)
    center = (place // stride * stride + stride // 2).clamp(max=n - 1)
    size = n if window is None or (inward and window > n) else window
    start = center - size // 2
    if inward or window is None:
        start = start.clamp(0, n - size)
    stop = (start + size).clamp(max=n)
    if bool((start <= 0).all() and (stop == n).all()):
        return _Axis(UNLIMITED, torch.zeros_like(start), stop)
    return _Axis(size, start, stop)


# -- exact windows -----------------------------------------------------------------------------------------------------


@cached
def _exact(
    order: TokenOrder,
    window: Grid,
    stride: Grid,
    inward: bool,
    text: tuple[int, int, bool],
    q_block: int,
    kv_block: int,
    device: torch.device,
) -> BlockLayout:
    before, after, text_rows = text
    axes = [_axis(n, k, g, inward) for n, k, g in zip(order.grid, window, stride)]
    place = order.coordinates().cpu()
    cells, kv_len = len(place), before + len(place) + after
    q_start, q_len = (before, kv_len) if text_rows else (0, cells)
    queries, keys = _boxes(place, q_start, q_block), _boxes(place, before, kv_block)
    nq, nk = ceil_div(q_len, q_block), ceil_div(kv_len, kv_block)
    touched, short = torch.zeros(nq, nk), torch.zeros(nq, nk)
    single = torch.equal(keys.block, torch.arange(nk))  # every block of keys is one box
    step = max(1, _PAIRS // len(keys.block))
    for low in range(0, len(queries.block), step):
        block, ends = queries.block[low : low + step], queries.ends[low : low + step]
        for total, found in ((touched, _all(axes, ends, keys, True)), (short, ~_all(axes, ends, keys, False))):
            columns = found.float() if single else _summed(found, keys.block, nk)
            total.index_add_(0, block, columns)
    text_q, text_k = _with_text(q_start, cells, q_len, q_block), _with_text(before, cells, kv_len, kv_block)
    attended, full = (touched > 0) | text_q[:, None] | text_k, short == 0
    mask = WindowMask(
        (axes[0].size, axes[1].size, axes[2].size),
        _table([axis.start[place[:, i]] for i, axis in enumerate(axes)], q_start, q_len),
        _table(list(place.unbind(1)), before, kv_len),
    )
    parts = ((attended & full)[None, None], (attended & ~full)[None, None])
    return BlockLayout.from_parts(*parts, mask, q_len, kv_len, q_block, kv_block).to(device)


@dataclass(frozen=True)
class _Boxes:
    """Blocks of a sequence, cut into boxes of the grid.

    Attributes:
        block: (n,) int64, ascending, the block of each box.
        ends: (n, 3, 2) int64, first and last position along each axis.
    """

    block: torch.Tensor
    ends: torch.Tensor


def _boxes(place: torch.Tensor, start: int, block: int) -> _Boxes:
    """Cut the blocks of a sequence whose grid tokens, at (S, 3), begin at token ``start``: the longest box first."""
    cells = len(place)
    cuts = torch.cat([torch.arange(start // block * block, start + cells, block) - start, torch.tensor([cells])])
    cuts = cuts.clamp(min=0)
    first, length = cuts[:-1], cuts.diff()
    blocks, ends = [], []
    while len(first):
        token = first[:, None] + torch.arange(int(length.max()))
        run = place[token.clamp(max=cells - 1)]
        low, high = run.cummin(1).values, run.cummax(1).values
        count = torch.arange(1, token.shape[1] + 1)
        is_box = ((high - low + 1).prod(-1) == count) & (count <= length[:, None])
        last = (is_box * count).amax(1) - 1
        rows = torch.arange(len(first))
        blocks.append((first + start) // block)
        ends.append(torch.stack([low[rows, last], high[rows, last]], -1))
        first, length = first + last + 1, length - last - 1
        first, length = first[length > 0], length[length > 0]
    found, order = torch.cat(blocks).sort(stable=True)
    return _Boxes(found, torch.cat(ends)[order])


def _all(axes: list[_Axis], ends: torch.Tensor, keys: _Boxes, touch: bool) -> torch.Tensor:
    """(q, k) bool, whether boxes touch (or contain) along every axis."""
    found = torch.ones(len(ends), len(keys.block), dtype=torch.bool)
    for i, axis in enumerate(axes):
        if axis.size < UNLIMITED:
            found &= (axis.touches if touch else axis.contains)(ends[:, i], keys.ends[:, i])
    return found


def _summed(found: torch.Tensor, block: torch.Tensor, blocks: int) -> torch.Tensor:
    """(q, blocks) fp32, the number of true boxes of each block."""
    return torch.zeros(len(found), blocks).index_add_(1, block, found.float())


def _with_text(start: int, cells: int, seq: int, block: int) -> torch.Tensor:
    """(n,) bool, blocks that hold a token outside of the grid."""
    first = torch.arange(0, seq, block)
    return (first < start) | ((first + block).clamp(max=seq) > start + cells)


def _table(rows: list[torch.Tensor], start: int, seq: int) -> torch.Tensor:
    """(1, S, 3) int32, a number for each grid token and axis; ``FREE`` for text."""
    table = torch.full((1, seq, len(rows)), FREE, dtype=torch.int32)
    table[0, start : start + len(rows[0])] = torch.stack(rows, 1).to(torch.int32)
    return table


# -- windows of full tiles ---------------------------------------------------------------------------------------------


@cached
def _snapped(
    order: TokenOrder, window: Grid, text_after: int, text_rows: bool, q_block: int, kv_block: int, device: torch.device
) -> BlockLayout:
    cells = len(order)
    kv_len = cells + text_after
    q_len = kv_len if text_rows else cells
    (q_low, q_side), (k_low, k_side) = _tiles(order, q_block), _tiles(order, kv_block)
    attended = torch.zeros(ceil_div(q_len, q_block), ceil_div(kv_len, kv_block), dtype=torch.bool)
    near = torch.ones(len(q_low), len(k_low), dtype=torch.bool)
    for axis, (size, k) in enumerate(zip(order.grid, window)):
        a, b, n = q_side[axis], k_side[axis], size // k_side[axis]
        count = n if k is None else min(n, ceil_div(max(k, a), b))
        start = torch.div(2 * q_low[:, axis] + a - count * b, 2 * b, rounding_mode="floor").clamp(0, n - count)
        tile = k_low[:, axis] // b
        near &= (tile >= start[:, None]) & (tile < start[:, None] + count)
    attended[: len(q_low), : len(k_low)] = near
    attended[len(q_low) :] = attended[:, len(k_low) :] = True
    return BlockLayout.from_mask(attended[None, None], q_len, kv_len, q_block, kv_block).to(device)


def _tiles(order: TokenOrder, block: int) -> tuple[torch.Tensor, Grid]:
    """(n, 3) first positions of the blocks of an order, which must be boxes of one shape that divides the grid."""
    fits = len(order) % block == 0
    if fits:
        place = order.coordinates().cpu().view(-1, block, 3)
        low = place.amin(1)
        sides = place.amax(1) - low + 1
        fits = bool((sides == sides[0]).all()) and not bool((low % sides[0]).any())
        t, h, w = sides[0].tolist()
        if fits and t * h * w == block and not any(n % side for n, side in zip(order.grid, (t, h, w))):
            return low, (t, h, w)
    raise DitAttnError(
        f"blocks of {block} tokens of {order!r} are no boxes of one shape; take token_order('tiles', grid, "
        "tile=window_tile(grid)) and the tokens of the tile, or inward_window, which takes any block"
    )


def window_tile(grid: tuple[int, ...], tokens: int = 128) -> Grid:
    """Return the tile (t, h, w) for windows in which all frames are: it divides the grid and holds all of them.

    Of the tiles that do, the one whose tokens are nearest to ``tokens``, and of those the most compact one. With more
    frames than ``tokens`` it holds as many as divide them.

    Args:
        grid: (T, H, W), or fewer axes.
        tokens: tokens per tile.

    Raises:
        DitAttnError: a size that is not a positive whole number, or not 1 to 3 axes.
    """
    frames, height, width = _grid(grid)
    check_sizes(tokens=tokens)
    t = max(n for n in range(1, min(frames, tokens) + 1) if frames % n == 0)
    boxes = [(t, h, w) for h in _divisors(height) for w in _divisors(width)]
    return min(boxes, key=lambda box: (abs(math.log(math.prod(box) / tokens)), box[1] ** 2 + box[2] ** 2, box))


def _divisors(n: int) -> list[int]:
    return [side for side in range(1, n + 1) if n % side == 0]
