"""Token orders of an image or video in which every block of the sequence is a compact box of the grid.

A row-major sequence of a ``(T, H, W)`` grid puts full rows into a block: thin, wide regions whose mean represents their
tokens poorly. Along a Hilbert curve, or tile by tile, a block is close to a cube.

::

    identity          hilbert           tiles (1, 2, 2)
    0  1  2  3        0  1 14 15         0  1  4  5
    4  5  6  7        3  2 13 12         2  3  6  7
    8  9 10 11        4  7  8 11        12 13  8  9      (each tile touches the previous one)
   12 13 14 15        5  6  9 10        14 15 10 11

An order depends on the shape alone, and is cached by shape and device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import torch

from dit_attn.errors import DitAttnError, unknown
from dit_attn.kernels.layouts.block_layout import ceil_div
from dit_attn.kernels.layouts.cache import cached

Grid = tuple[int, int, int]
TILES: dict[int, Grid] = {1: (1, 8, 16), 2: (2, 8, 8), 3: (3, 6, 7), 4: (4, 4, 8)}
"""128 tokens (126 for three frames) by the number of frames."""


@dataclass(frozen=True, eq=False, repr=False)
class TokenOrder:
    """A permutation of the tokens of a grid.

    Attributes:
        order: (S,) int64; the token at each position: ``reordered[r] = row_major[order[r]]``.
        inverse: (S,) int64; the position of each token: ``inverse[order] = 0 .. S - 1``.
        name: a name of ``ORDERS``.
        grid: (T, H, W), ``S = T * H * W``.
    """

    order: torch.Tensor
    inverse: torch.Tensor
    name: str
    grid: Grid

    def apply(self, x: torch.Tensor, dim: int = 1, start: int = 0) -> torch.Tensor:
        """Reorder the tokens ``start .. start + S`` of ``x`` along ``dim``; tokens before and after stay in place.

        One gather; differentiable. The identity returns ``x`` itself.

        Raises:
            DitAttnError: ``x`` has fewer tokens than the grid from ``start`` on.
        """
        return self._gathered(x, dim, start, self.order)

    def undo(self, x: torch.Tensor, dim: int = 1, start: int = 0) -> torch.Tensor:
        """Invert :meth:`apply`, bit for bit."""
        return self._gathered(x, dim, start, self.inverse)

    def coordinates(self) -> torch.Tensor:
        """Return (S, 3) int64, the (t, h, w) of the token at each position."""
        _, h, w = self.grid
        return torch.stack([self.order // (h * w), self.order // w % h, self.order % w], -1)

    def _gathered(self, x: torch.Tensor, dim: int, start: int, index: torch.Tensor) -> torch.Tensor:
        total = x.shape[dim]
        if start < 0 or start + len(index) > total:
            raise DitAttnError(
                f"{self!r} covers tokens {start} .. {start + len(index)}, but dimension {dim} of a tensor of shape "
                f"{tuple(x.shape)} has {total}; give the grid and the start of the visual tokens of this sequence"
            )
        if self.name == "identity":
            return x
        if total > len(index):
            inside = torch.arange(total, device=index.device)
            inside[start : start + len(index)] = index + start
            index = inside
        return x.index_select(dim, index.to(x.device))

    def __len__(self) -> int:
        return len(self.order)

    def __repr__(self) -> str:
        return f"TokenOrder({self.name}, {' x '.join(map(str, self.grid))})"


def token_order(
    name: str,
    grid: tuple[int, ...],
    *,
    tile: Grid | None = None,
    device: torch.device | str = "cpu",
) -> TokenOrder:
    """Return the order of a name for a grid; cached by its arguments.

    - ``hilbert``: the generalised Hilbert curve (J. Cerveny), for any sizes; starts at token 0. Neighbours in the order
      share a face of the grid at every step if the grid is a plane, or if all its sizes are even. With odd sizes some
      steps (less than 1 % in grids of videos) skip tokens: by 2 along an axis, in some grids by 3.
    - ``tiles``: boxes of ``tile`` tokens, visited to and fro so that each box touches the previous one; inside a box
      time runs fastest, then width, then height. Boxes at the far borders are cut off where the grid ends.
    - ``columns``: row-major by (h, w), time runs fastest: all frames of a position are adjacent.
    - ``identity``: row-major, unchanged.

    Args:
        name: a name of ``ORDERS``.
        grid: (T, H, W), or (H, W) for an image.
        tile: (t, h, w) for ``tiles``; ``t * h * w`` best equals the block of the attention kernel. By default 128
            tokens: (4, 4, 8), or fewer and larger planes where the grid has fewer than 4.
        device: where the permutation is.

    Raises:
        DitAttnError: an unknown name, or a size below 1.
    """
    if name not in ORDERS:
        raise unknown("token order", name, ORDERS)
    if len(grid) not in (2, 3) or min(grid) < 1:
        raise DitAttnError(f"grid must be (T, H, W) or (H, W) of sizes of at least 1, got {tuple(grid)}")
    t, h, w = (1, *grid) if len(grid) == 2 else grid
    tile = TILES[min(t, 4)] if tile is None else tile
    if len(tile) != 3 or min(tile) < 1:
        raise DitAttnError(f"tile must be (t, h, w) of sizes of at least 1, got {tuple(tile)}")
    a, b, c = tile if name == "tiles" else (1, 1, 1)
    return _cached_order(name, (t, h, w), (a, b, c), torch.device(device))


def exact_box(grid: Grid, tokens: int) -> Grid | None:
    """Return the most compact (t, h, w) box of ``tokens`` tokens that divides the grid, or ``None`` if none does.

    With it as the tile, every block of the sequence is exactly one box, and no block is cut off at a border.
    """
    boxes = [
        (t, h, tokens // (t * h))
        for t, h in product(range(1, grid[0] + 1), range(1, grid[1] + 1))
        if tokens % (t * h) == 0
    ]
    fitting = [box for box in boxes if not any(size % side for size, side in zip(grid, box, strict=True))]
    return min(fitting, key=lambda box: (sum(side * side for side in box), box), default=None)


def block_neighbors(*orders: TokenOrder, block: int, kv_block: int | None = None) -> torch.Tensor:
    """Return which blocks of a reordered sequence touch: tokens of the two are neighbors (of 26) on the grid.

    Args:
        orders: the token order, or one per grid where the sequence is a concatenation of several; tokens of different
            grids never touch.
        block: tokens per query block.
        kv_block: tokens per key block, by default the same.

    Returns:
        (nq, nk) bool; blocks that share a token touch. Cached by the arguments.

    Raises:
        DitAttnError: a block size below 1.
    """
    kv_block = block if kv_block is None else kv_block
    if min(block, kv_block) < 1:
        raise DitAttnError(f"block must be at least 1, got {min(block, kv_block)}")
    return _cached_neighbors(orders, block, kv_block)


@cached
def _cached_neighbors(orders: tuple[TokenOrder, ...], block: int, kv_block: int) -> torch.Tensor:
    total = sum(len(order) for order in orders)
    device = orders[0].inverse.device
    touching = torch.zeros(ceil_div(total, block), ceil_div(total, kv_block), dtype=torch.bool, device=device)
    start = 0
    for order in orders:
        place = (order.inverse + start).view(order.grid)
        start += len(order)
        for steps in product((-1, 0, 1), repeat=3):
            here, there = place // block, place // kv_block
            for axis, step in enumerate(steps):
                inner = max(place.shape[axis] - abs(step), 0)
                here = here.narrow(axis, min(max(0, -step), place.shape[axis]), inner)
                there = there.narrow(axis, min(max(0, step), place.shape[axis]), inner)
            touching[here.flatten(), there.flatten()] = True
    return touching


@cached
def _cached_order(name: str, grid: Grid, tile: Grid, device: torch.device) -> TokenOrder:
    if device.type != "cpu":
        made = _cached_order(name, grid, tile, torch.device("cpu"))
        return TokenOrder(made.order.to(device), made.inverse.to(device), name, grid)
    order = ORDERS[name](grid, tile)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order))
    return TokenOrder(order, inverse, name, grid)


# -- the orders --------------------------------------------------------------------------------------------------------


def _identity(grid: Grid, tile: Grid) -> torch.Tensor:
    return torch.arange(grid[0] * grid[1] * grid[2])


def _columns(grid: Grid, tile: Grid) -> torch.Tensor:
    return torch.arange(math.prod(grid)).view(grid).permute(1, 2, 0).flatten()


def _tiles(grid: Grid, tile: Grid) -> torch.Tensor:
    t, h, w = torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij")
    places, counts = [], []
    for x, step, size in zip((t, h, w), tile, grid):
        places.append((x // step, x % step))
        counts.append(ceil_div(size, step))
    (bt, it), (bh, ih), (bw, iw) = places
    bh = torch.where(bt % 2 == 0, bh, counts[1] - 1 - bh)
    row = bt * counts[1] + bh
    bw = torch.where(row % 2 == 0, bw, counts[2] - 1 - bw)
    key = ((((row * counts[2] + bw) * tile[1] + ih) * tile[2]) + iw) * tile[0] + it
    return key.flatten().argsort()


def _hilbert(grid: Grid, tile: Grid) -> torch.Tensor:
    """All boxes of one recursion depth are cut at once; a few dozen passes for any grid."""
    t, h, w = grid
    total = t * h * w
    # A plane is traversed as a plane, along an even side if it has one: that curve needs no diagonal step.
    plane = min(grid) == 1
    sides = sorted(((w, 0, 0), (0, h, 0), (0, 0, t)), key=lambda side: plane * (2 * (sum(side) == 1) + sum(side) % 2))
    axes = torch.tensor([sides])  # (boxes, 3 sides, xyz)
    corner, first = torch.zeros(1, 3, dtype=torch.long), torch.zeros(1, dtype=torch.long)
    order = torch.empty(total, dtype=torch.long)
    weight = torch.tensor([1, w, w * h])
    while len(first):
        sizes = axes.sum(-1).abs()
        line = (sizes == 1).sum(-1) >= 2
        _walk_lines(order, corner[line], axes[line], first[line], weight)
        corner, axes, first = _cut(corner[~line], axes[~line], first[~line])
    return order


def _walk_lines(
    order: torch.Tensor, corner: torch.Tensor, axes: torch.Tensor, first: torch.Tensor, weight: torch.Tensor
) -> None:
    """Number the cells of boxes that are one cell thick in two directions."""
    lengths = axes.sum(-1).abs().amax(-1)
    longest = axes.sum(-1).abs().argmax(-1)
    step = axes[torch.arange(len(axes)), longest].sign()
    box = torch.repeat_interleave(torch.arange(len(axes)), lengths)
    along = torch.arange(len(box)) - (lengths.cumsum(0) - lengths)[box]
    order[first[box] + along] = ((corner[box] + along[:, None] * step[box]) * weight).sum(-1)


def _cut(corner: torch.Tensor, axes: torch.Tensor, first: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Cut boxes that are thick in at least two directions into two, three or five, in the order of the curve.

    A side is halved to an even length where it can be: a curve through an even box ends next to where the next begins.
    """
    a, b, c = axes.unbind(1)
    da, db, dc = axes.sign().unbind(1)
    w, h, s = axes.sum(-1).abs().unbind(1)
    a2, b2, c2 = (_even_half(side) for side in (a, b, c))
    wide = (2 * w > 3 * h) & (2 * w > 3 * s)
    flat = ~wide & (3 * h > 4 * s)
    tall = ~wide & ~flat & (3 * s > 4 * h)
    full = ~wide & ~flat & ~tall
    o = corner
    far = o + a - da
    cuts = {
        "wide": (wide, [(o, a2, b, c), (o + a2, a - a2, b, c)]),
        "flat": (flat, [(o, b2, c, a2), (o + b2, a, b - b2, c), (far + b2 - db, -b2, c, a2 - a)]),
        "tall": (tall, [(o, c2, a2, b), (o + c2, a, b, c - c2), (far + c2 - dc, -c2, a2 - a, b)]),
        "full": (
            full,
            [
                (o, b2, c2, a2),
                (o + b2, c, a2, b - b2),
                (o + b2 - db + c - dc, a, -b2, c2 - c),
                (far + b2 + c - dc, -c, a2 - a, b - b2),
                (far + b2 - db, -b2, c2, a2 - a),
            ],
        ),
    }
    corners, sides, firsts = [], [], []
    for chosen, parts in cuts.values():
        low = first[chosen]
        for box_parts in parts:
            new, *vectors = (x[chosen] for x in box_parts)
            box = torch.stack(vectors, 1)
            volume = box.sum(-1).abs().prod(-1)
            real = volume > 0
            corners.append(new[real])
            sides.append(box[real])
            firsts.append(low[real])
            low = low + volume
    return torch.cat(corners), torch.cat(sides), torch.cat(firsts)


def _even_half(side: torch.Tensor) -> torch.Tensor:
    """Half of (boxes, 3) sides along one axis each, made even where the side is longer than 2."""
    half = torch.div(side, 2, rounding_mode="floor")
    odd = (half.sum(-1).abs() % 2 == 1) & (side.sum(-1).abs() > 2)
    return half + odd[:, None] * side.sign()


ORDERS: dict[str, Callable[[Grid, Grid], torch.Tensor]] = {
    "identity": _identity,
    "hilbert": _hilbert,
    "tiles": _tiles,
    "columns": _columns,
}
