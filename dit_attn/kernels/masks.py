"""Which pairs of a block are read, where a block is read only in part: rules over token numbers, or bits.

A rule is a few numbers that a kernel takes as arguments; no table of S x S exists anywhere. ``KINDS`` maps the numbers
kernels know them by to classes; a new rule is a class here and a branch in ``triton_forward.element_allowed``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from dit_attn.errors import DitAttnError

NUMBERS = 12  # how many a rule is described by, filled up with zeros


@dataclass(frozen=True)
class Tiles:
    """Query blocks of one batch row and some of the key blocks each of them reads in part.

    Attributes:
        batch: batch row.
        heads: (n,) int64, query head of each tile.
        rows: (n,) int64, query block.
        columns: (n, w) int64, key blocks.
        entries: (n, w) int64, which of the row's partial entries each is, counted from 0.
        tokens: queries per tile, at most ``q_block``.
        q_block, kv_block: tokens per block.
    """

    batch: int
    heads: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor
    entries: torch.Tensor
    tokens: int
    q_block: int
    kv_block: int


class ElementMask(ABC):
    """A rule for the partial entries of a :class:`~dit_attn.kernels.BlockLayout`."""

    kind: ClassVar[int]

    @abstractmethod
    def numbers(self) -> tuple[int, ...]:
        """``NUMBERS`` ints that describe the rule to a kernel."""

    def tensors(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Tables of the rule, where it has any."""
        return None, None

    @abstractmethod
    def allowed(self, q: torch.Tensor, k: torch.Tensor, batch: int = 0) -> torch.Tensor:
        """Bool, whether query numbers ``q`` read key numbers ``k`` (ints, broadcast together)."""

    def read(self, tiles: Tiles) -> torch.Tensor:
        """(n, tokens, w * kv_block) bool, which pairs of some tiles are read."""
        kind, device = torch.int32, tiles.rows.device
        q = tiles.rows[:, None].to(kind) * tiles.q_block + torch.arange(tiles.tokens, dtype=kind, device=device)
        k = tiles.columns[..., None].to(kind) * tiles.kv_block + torch.arange(tiles.kv_block, dtype=kind, device=device)
        return self.allowed(q[:, :, None], k.flatten(1)[:, None], tiles.batch)

    def misfit(self, q_len: int, kv_len: int, q_block: int, kv_block: int) -> str | None:
        """Why the tables do not fit so many tokens in such blocks, or ``None``."""
        return None

    @abstractmethod
    def from_block(self, block: int, q_block: int) -> ElementMask:
        """The same rule where query block ``block`` of ``q_block`` tokens is the first one."""

    def of_heads(self, heads: slice) -> ElementMask:
        """The same rule for some of the query heads."""
        return self

    def to(self, device: torch.device | str) -> ElementMask:
        """The same rule with its tables on another device."""
        a, b = (None if x is None else x.to(device) for x in self.tensors())
        return rebuild_mask(self.kind, self.numbers(), a, b)

    def same(self, other: ElementMask | None) -> bool:
        """Whether another rule is described by the same numbers and tables."""
        if other is None or self.kind != other.kind or self.numbers() != other.numbers():
            return False
        pairs = zip(self.tensors(), other.tensors())
        return all(a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)


@dataclass(frozen=True)
class WindowMask(ElementMask):
    """Neighbours on a grid of up to three axes; tokens outside of the grid (text) read and are read by everything.

    Along an axis of N positions with a window of K, query position p reads K positions from ``clamp(p - K // 2, 0,
    N - K)`` on: at a border the window moves inward, so that every query reads equally many (the border rule of
    neighbourhood attention, FreeSwim's inward window). With ``inward=False`` it is cut off instead.

    Attributes:
        grid: (T, H, W) positions; token ``(t * H + h) * W + w``.
        window: positions read along each axis, 1 to the axis' length.
        q_start, k_start: number of the grid's first token among the queries and among the keys.
        inward: move the window at a border rather than cut it.
    """

    kind: ClassVar[int] = 1
    grid: tuple[int, int, int]
    window: tuple[int, int, int]
    q_start: int = 0
    k_start: int = 0
    inward: bool = True

    def __post_init__(self) -> None:
        if any(not 1 <= size <= n for size, n in zip(self.window, self.grid)):
            raise DitAttnError(f"window {self.window} must lie between 1 and the grid {self.grid} along every axis")

    def numbers(self) -> tuple[int, ...]:
        return (*self.grid, *self.window, self.q_start, self.k_start, int(self.inward), 0, 0, 0)

    def from_block(self, block: int, q_block: int) -> WindowMask:
        return replace(self, q_start=self.q_start - block * q_block)

    def start(self, position: torch.Tensor, axis: int) -> torch.Tensor:
        """First position read from ``position`` along an axis; negative where an outward window is cut."""
        size = self.window[axis]
        start = position - size // 2
        return start.clamp(0, self.grid[axis] - size) if self.inward else start

    def allowed(self, q: torch.Tensor, k: torch.Tensor, batch: int = 0) -> torch.Tensor:
        cells = self.grid[0] * self.grid[1] * self.grid[2]
        qv, kv = q - self.q_start, k - self.k_start
        text = ((qv < 0) | (qv >= cells)) | ((kv < 0) | (kv >= cells))
        read = ~text
        for axis, (a, b) in enumerate(zip(self.positions(qv), self.positions(kv))):
            if self.window[axis] < self.grid[axis] or not self.inward:
                start = self.start(a, axis)
                read &= (b >= start) & (b < start + self.window[axis])
        return read | text

    def positions(self, cell: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(t, h, w) of a cell number."""
        _, height, width = self.grid
        return cell // (height * width), cell // width % height, cell % width


@dataclass(frozen=True)
class BandMask(ElementMask):
    """A band around the diagonal, and sink keys that every query reads.

    Query n reads key m if ``m < sinks`` or ``-before <= m - (n + q_shift) <= after``.
    """

    kind: ClassVar[int] = 2
    before: int
    after: int
    sinks: int = 0
    q_shift: int = 0

    def numbers(self) -> tuple[int, ...]:
        return (self.before, self.after, self.sinks, self.q_shift, *(0,) * 8)

    def from_block(self, block: int, q_block: int) -> BandMask:
        return replace(self, q_shift=self.q_shift + block * q_block)

    def allowed(self, q: torch.Tensor, k: torch.Tensor, batch: int = 0) -> torch.Tensor:
        distance = k - q - self.q_shift
        return (distance >= -self.before) & (distance <= self.after) | (k < self.sinks)


@dataclass(frozen=True, eq=False)
class SegmentMask(ElementMask):
    """Packed sequences: a query reads the keys that carry its segment number.

    Attributes:
        q_ids: (B|1, Sq) int32.
        k_ids: (B|1, Sk) int32.
    """

    kind: ClassVar[int] = 3
    q_ids: torch.Tensor
    k_ids: torch.Tensor

    def numbers(self) -> tuple[int, ...]:
        return (0,) * NUMBERS

    def tensors(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        return self.q_ids, self.k_ids

    def misfit(self, q_len: int, kv_len: int, q_block: int, kv_block: int) -> str | None:
        if self.q_ids.shape[1] >= q_len and self.k_ids.shape[1] >= kv_len:
            return None
        return f"segment numbers of {self.q_ids.shape[1]} x {self.k_ids.shape[1]} tokens for {q_len} x {kv_len}"

    def from_block(self, block: int, q_block: int) -> SegmentMask:
        return SegmentMask(self.q_ids[:, block * q_block :], self.k_ids)

    def allowed(self, q: torch.Tensor, k: torch.Tensor, batch: int = 0) -> torch.Tensor:
        own, other = (x[batch if x.shape[0] > 1 else 0] for x in (self.q_ids, self.k_ids))
        return own[q.clamp(max=len(own) - 1).long()] == other[k.clamp(max=len(other) - 1).long()]


@dataclass(frozen=True, eq=False)
class BitMask(ElementMask):
    """Any pattern, bit by bit.

    Attributes:
        bits: (B|1, H|1, nq, entries, q_block, ceil(kv_block / 32)) int32: bit ``j % 32`` of word ``j // 32`` says
            whether a query of the block reads key j of the row's partial entry.
    """

    kind: ClassVar[int] = 4
    bits: torch.Tensor

    def numbers(self) -> tuple[int, ...]:
        return (self.bits.shape[3], *(0,) * (NUMBERS - 1))

    def tensors(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        return self.bits, None

    def misfit(self, q_len: int, kv_len: int, q_block: int, kv_block: int) -> str | None:
        nq, words = -(-q_len // q_block), -(-kv_block // 32)
        rows, tokens, held = (self.bits.shape[i] for i in (2, 4, 5))
        if rows >= nq and (tokens, held) == (q_block, words):
            return None
        return f"bits (B|1, H|1, {nq}, entries, {q_block}, {words}) are needed, got {tuple(self.bits.shape)}"

    def of_heads(self, heads: slice) -> BitMask:
        return BitMask(self.bits[:, heads]) if self.bits.shape[1] > 1 else self

    def from_block(self, block: int, q_block: int) -> BitMask:
        return BitMask(self.bits[:, :, block:])

    def allowed(self, q: torch.Tensor, k: torch.Tensor, batch: int = 0) -> torch.Tensor:
        raise NotImplementedError("bits belong to entries of a layout, not to token numbers; use read()")

    def read(self, tiles: Tiles) -> torch.Tensor:
        bits = self.bits[tiles.batch if self.bits.shape[0] > 1 else 0]
        heads = tiles.heads if bits.shape[0] > 1 else torch.zeros_like(tiles.heads)
        entries = tiles.entries.clamp(0, bits.shape[2] - 1)
        words = bits[heads[:, None], tiles.rows[:, None], entries, : tiles.tokens]  # (n, w, tokens, words)
        key = torch.arange(tiles.kv_block, device=bits.device)
        read = (words[..., key // 32] >> (key % 32)) & 1
        return read.bool().transpose(1, 2).flatten(2)


def pack_bits(read: torch.Tensor) -> torch.Tensor:
    """(..., ceil(n / 32)) int32 from (..., n) bool; bit ``j % 32`` of word ``j // 32`` is element j."""
    padded = torch.nn.functional.pad(read, (0, -read.shape[-1] % 32)).unflatten(-1, (-1, 32)).to(torch.int64)
    return (padded << torch.arange(32, device=read.device)).sum(-1).to(torch.int32)  # the 32nd bit is the sign


def rebuild_mask(
    kind: int, numbers: tuple[int, ...] | list[int], a: torch.Tensor | None, b: torch.Tensor | None
) -> ElementMask:
    """The rule that ``kind``, ``numbers()`` and ``tensors()`` describe."""
    n = tuple(numbers)
    if kind == WindowMask.kind:
        return WindowMask((n[0], n[1], n[2]), (n[3], n[4], n[5]), n[6], n[7], bool(n[8]))
    if kind == BandMask.kind:
        return BandMask(*n[:4])
    if kind == SegmentMask.kind and a is not None and b is not None:
        return SegmentMask(a, b)
    if kind == BitMask.kind and a is not None:
        return BitMask(a)
    raise DitAttnError(f"no element mask of kind {kind}; known kinds are 1 to 4, see dit_attn.kernels.masks")
