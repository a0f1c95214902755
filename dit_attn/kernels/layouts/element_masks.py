"""Element masks: which pairs of a partial block are attended to, as rules over token numbers or as bits.

A rule is a few integers that a kernel takes as arguments; no table of size S x S exists. Kernels know each class by its
``kind``; a new rule is a class here and a branch in ``backends/triton/tiles.py``, ``element_allowed``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from dit_attn.errors import DitAttnError

NUMBERS = 4  # integers that describe a rule, padded with zeros
FREE = -(1 << 30)
"""In place of a position: a token outside of the grid, which attends to every key and is attended to by every query."""
UNLIMITED = 1 << 30
"""In place of a window's size: the axis is not restricted."""


@dataclass(frozen=True)
class Tiles:
    """Query blocks of one batch row, with some of the partial key blocks of each.

    Attributes:
        batch: batch row.
        heads: (n,) int64, query head of each tile.
        rows: (n,) int64, query block.
        columns: (n, w) int64, key blocks.
        entries: (n, w) int64, index of each among the partial entries of its row.
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
    """A rule for the pairs of the partial blocks of a :class:`~dit_attn.kernels.BlockLayout`."""

    kind: ClassVar[int]

    @abstractmethod
    def numbers(self) -> tuple[int, ...]:
        """Return the ``NUMBERS`` ints that describe the rule to a kernel."""

    def tensors(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Return the tables of the rule, ``None`` where it has none."""
        return None, None

    @abstractmethod
    def allowed(self, q: torch.Tensor, k: torch.Tensor, batch: int = 0) -> torch.Tensor:
        """Return whether queries attend to keys: bool, for token numbers ``q`` and ``k`` that broadcast together."""

    def allowed_pairs(self, tiles: Tiles) -> torch.Tensor:
        """Return (n, tokens, w * kv_block) bool, True for the pairs of some tiles that are attended to."""
        kind, device = torch.int32, tiles.rows.device
        q = tiles.rows[:, None].to(kind) * tiles.q_block + torch.arange(tiles.tokens, dtype=kind, device=device)
        k = tiles.columns[..., None].to(kind) * tiles.kv_block + torch.arange(tiles.kv_block, dtype=kind, device=device)
        return self.allowed(q[:, :, None], k.flatten(1)[:, None], tiles.batch)

    def factors(self, tiles: Tiles) -> list[tuple[torch.Tensor, torch.Tensor]] | None:
        """Return the rule as rules that must all allow a pair, each with few distinct rows; ``None`` if it has none.

        Returns:
            For each of them (n, P, w * kv_block) bool, rows of allowed keys, and (n, tokens) ints, the row of each
            query. Keys past the end of the sequence are not allowed.
        """
        return None

    def size_mismatch(self, q_len: int, kv_len: int, q_block: int, kv_block: int) -> str | None:
        """Return why the tables do not fit these lengths and block sizes, or ``None`` if they do."""
        return None

    @abstractmethod
    def from_block(self, block: int, q_block: int) -> ElementMask:
        """Return the rule for the queries from block ``block`` of ``q_block`` tokens on, numbered from 0."""

    def of_heads(self, heads: slice) -> ElementMask:
        """Return the rule for some of the query heads."""
        return self

    def to(self, device: torch.device | str) -> ElementMask:
        """Return the rule with its tables on another device."""
        a, b = (None if x is None else x.to(device) for x in self.tensors())
        return rebuild_mask(self.kind, self.numbers(), a, b)

    def same(self, other: ElementMask | None) -> bool:
        """Return whether another rule has the same kind, numbers and tables."""
        if other is None or self.kind != other.kind or self.numbers() != other.numbers():
            return False
        pairs = zip(self.tensors(), other.tensors())
        return all(a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)


@dataclass(frozen=True, eq=False)
class WindowMask(ElementMask):
    """A window on a grid of three axes, its tokens in any order; tokens outside of the grid (text) are not restricted.

    Along every axis a query attends to ``window`` positions from its start on, whatever rule its starts follow:
    :mod:`~dit_attn.kernels.layouts.windows` has the rules.

    Attributes:
        window: size along each axis, ``UNLIMITED`` for all of it.
        starts: (1, Sq, 3) int32, first position of each query's window, ``FREE`` for text.
        places: (1, Sk, 3) int32, position of each key, ``FREE`` for text.
    """

    kind: ClassVar[int] = 1
    window: tuple[int, int, int]
    starts: torch.Tensor
    places: torch.Tensor

    def numbers(self) -> tuple[int, ...]:
        return (*self.window, 0)

    def tensors(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        return self.starts, self.places

    def size_mismatch(self, q_len: int, kv_len: int, q_block: int, kv_block: int) -> str | None:
        if self.starts.shape[1] >= q_len and self.places.shape[1] >= kv_len:
            return None
        return f"windows of {self.starts.shape[1]} x {self.places.shape[1]} tokens for {q_len} x {kv_len}"

    def from_block(self, block: int, q_block: int) -> WindowMask:
        return replace(self, starts=self.starts[:, block * q_block :])

    def allowed(self, q: torch.Tensor, k: torch.Tensor, batch: int = 0) -> torch.Tensor:
        starts, places = self.starts[0].T, self.places[0].T
        q, k = q.clamp(max=starts.shape[1] - 1).long(), k.clamp(max=places.shape[1] - 1).long()
        attended = torch.ones((), dtype=torch.bool, device=starts.device)
        for axis, size in enumerate(self.window):
            if size < UNLIMITED:
                start, place = starts[axis][q], places[axis][k]
                attended = attended & (place >= start) & (place < start + size)
        return attended | (starts[0][q] == FREE) | (places[0][k] == FREE)

    def factors(self, tiles: Tiles) -> list[tuple[torch.Tensor, torch.Tensor]]:
        starts, places = self.starts[0].T, self.places[0].T
        q = tiles.rows[:, None] * tiles.q_block + torch.arange(tiles.tokens, device=starts.device)
        k = tiles.columns[..., None] * tiles.kv_block + torch.arange(tiles.kv_block, device=starts.device)
        exists = (k < places.shape[1]).flatten(1)
        k = k.clamp(max=places.shape[1] - 1).flatten(1)
        free_key = places[0][k] == FREE
        found = []
        for axis, size in enumerate(self.window):
            if size == UNLIMITED:
                continue
            start, place = starts[axis][q], places[axis][k]
            free = start == FREE
            low = start.masked_fill(free, UNLIMITED).amin(1, keepdim=True)
            row = (start - low + 1).masked_fill_(free, 0)  # row 0 is that of text
            count = int(row.max())
            if count < tiles.tokens:
                first = low + torch.arange(count, dtype=torch.int32, device=starts.device)
            else:
                first, row = start, (torch.arange(1, tiles.tokens + 1, device=starts.device) * ~free)
            inside = (place[:, None] >= first[..., None]) & (place[:, None] < first[..., None] + size)
            inside |= free_key[:, None]
            rows = torch.cat([torch.ones_like(inside[:, :1]), inside], 1) & exists[:, None]
            found.append((rows, row))
        return found


@dataclass(frozen=True)
class BandMask(ElementMask):
    """A band around the diagonal, and sink keys that every query attends to.

    Query n attends to key m if ``m < sinks`` or ``-before <= m - (n + q_shift) <= after``.
    """

    kind: ClassVar[int] = 2
    before: int
    after: int
    sinks: int = 0
    q_shift: int = 0

    def numbers(self) -> tuple[int, ...]:
        return (self.before, self.after, self.sinks, self.q_shift)

    def from_block(self, block: int, q_block: int) -> BandMask:
        return replace(self, q_shift=self.q_shift + block * q_block)

    def allowed(self, q: torch.Tensor, k: torch.Tensor, batch: int = 0) -> torch.Tensor:
        distance = k - q - self.q_shift
        return (distance >= -self.before) & (distance <= self.after) | (k < self.sinks)


@dataclass(frozen=True, eq=False)
class SegmentMask(ElementMask):
    """Packed sequences: a query attends to the keys with its own segment number.

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

    def size_mismatch(self, q_len: int, kv_len: int, q_block: int, kv_block: int) -> str | None:
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
        bits: (B|1, H|1, nq, entries, q_block, ceil(kv_block / 32)) int32: bit ``j % 32`` of word ``j // 32`` is set
            if a query of the block attends to key j of the row's partial entry.
    """

    kind: ClassVar[int] = 4
    bits: torch.Tensor

    def numbers(self) -> tuple[int, ...]:
        return (self.bits.shape[3], *(0,) * (NUMBERS - 1))

    def tensors(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        return self.bits, None

    def size_mismatch(self, q_len: int, kv_len: int, q_block: int, kv_block: int) -> str | None:
        nq, words = -(-q_len // q_block), -(-kv_block // 32)
        rows, tokens, stored = (self.bits.shape[i] for i in (2, 4, 5))
        if rows >= nq and (tokens, stored) == (q_block, words):
            return None
        return f"bits (B|1, H|1, {nq}, entries, {q_block}, {words}) are needed, got {tuple(self.bits.shape)}"

    def of_heads(self, heads: slice) -> BitMask:
        return BitMask(self.bits[:, heads]) if self.bits.shape[1] > 1 else self

    def from_block(self, block: int, q_block: int) -> BitMask:
        return BitMask(self.bits[:, :, block:])

    def allowed(self, q: torch.Tensor, k: torch.Tensor, batch: int = 0) -> torch.Tensor:
        raise NotImplementedError("bits belong to entries of a layout, not to token numbers; use allowed_pairs()")

    def allowed_pairs(self, tiles: Tiles) -> torch.Tensor:
        bits = self.bits[tiles.batch if self.bits.shape[0] > 1 else 0]
        heads = tiles.heads if bits.shape[0] > 1 else torch.zeros_like(tiles.heads)
        entries = tiles.entries.clamp(0, bits.shape[2] - 1)
        words = bits[heads[:, None], tiles.rows[:, None], entries, : tiles.tokens]  # (n, w, tokens, words)
        key = torch.arange(tiles.kv_block, device=bits.device)
        attended = (words[..., key // 32] >> (key % 32)) & 1
        return attended.bool().transpose(1, 2).flatten(2)


def pack_bits(attended: torch.Tensor) -> torch.Tensor:
    """Pack (..., n) bool into (..., ceil(n / 32)) int32; bit ``j % 32`` of word ``j // 32`` is element j."""
    padded = torch.nn.functional.pad(attended, (0, -attended.shape[-1] % 32)).unflatten(-1, (-1, 32)).to(torch.int64)
    return (padded << torch.arange(32, device=attended.device)).sum(-1).to(torch.int32)  # the 32nd bit is the sign


def rebuild_mask(
    kind: int, numbers: tuple[int, ...] | list[int], a: torch.Tensor | None, b: torch.Tensor | None
) -> ElementMask:
    """Rebuild the rule that ``kind``, ``numbers()`` and ``tensors()`` describe."""
    n = tuple(numbers)
    if kind == WindowMask.kind and a is not None and b is not None:
        return WindowMask((n[0], n[1], n[2]), a, b)
    if kind == BandMask.kind:
        return BandMask(*n[:4])
    if kind == SegmentMask.kind and a is not None and b is not None:
        return SegmentMask(a, b)
    if kind == BitMask.kind and a is not None:
        return BitMask(a)
    raise DitAttnError(f"unknown element mask kind {kind}; the kinds are 1 to 4, see kernels/layouts/element_masks.py")
