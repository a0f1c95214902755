"""The block layout: which key blocks each query block attends to, as lists; nothing of size S x S is stored."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch

from dit_attn.errors import DitAttnError
from dit_attn.kernels.checks import check_blocks, check_choices, check_sizes, dtype_name, is_whole
from dit_attn.kernels.device import host_readable
from dit_attn.kernels.layouts.block_lists import (
    ReverseLists,
    full_then_partial,
    reverse_lists,
    top_k_blocks,
    top_p_blocks,
)
from dit_attn.kernels.layouts.cache import cached
from dit_attn.kernels.layouts.element_masks import BitMask, ElementMask, Tiles, pack_bits


def ceil_div(a: int, b: int) -> int:
    """Return ``ceil(a / b)`` for non-negative ints."""
    return -(-a // b)


@dataclass(frozen=True, eq=False, repr=False)
class BlockLayout:
    """A block-sparse attention pattern: for every query block, the list of its key blocks.

    Names follow FlexAttention's ``BlockMask``.

    ::

        keys      0    1    2    3          kv_indices    kv_num_blocks
        queries                             [0 1 .]       2
           0      #    #    .    .          [1 2 3]       3
           1      .    #    #    #          [3 . .]       1
           2      .    .    .    #

    Attributes:
        q_block: tokens per query block.
        kv_block: tokens per key block.
        q_len: number of queries, Sq; the last block may be ragged.
        kv_len: number of keys, Sk; the last block may be ragged.
        kv_indices: (B|1, H|1, nq, kcap) int32, key blocks of every query block: first the full ones, then the partial
            ones, each ascending; entries at or past the count are ignored.
        kv_num_blocks: (B|1, H|1, nq) int32, number of key blocks of every query block.
        uniform: the count when every row is known to have the same one, without reading a device; else ``None``.
        full_kv_num_blocks: (B|1, H|1, nq) int32, how many entries of a row are full; ``None`` when all are.
        elements: which pairs of the partial entries are attended to; ``None`` when there are no partial ones.

    Raises:
        DitAttnError: a size below 1, or tensors whose shapes do not fit the sizes.
    """

    q_block: int
    kv_block: int
    q_len: int
    kv_len: int
    kv_indices: torch.Tensor
    kv_num_blocks: torch.Tensor
    uniform: int | None = None
    full_kv_num_blocks: torch.Tensor | None = None
    elements: ElementMask | None = None

    def __post_init__(self) -> None:
        check_sizes(q_len=self.q_len, kv_len=self.kv_len, q_block=self.q_block, kv_block=self.kv_block)
        if (self.full_kv_num_blocks is None) != (self.elements is None):
            raise DitAttnError("BlockLayout needs full_kv_num_blocks and elements together, or neither; see from_parts")
        if self.full_kv_num_blocks is not None and self.full_kv_num_blocks.shape != self.kv_num_blocks.shape:
            raise DitAttnError(
                f"BlockLayout needs full_kv_num_blocks of kv_num_blocks' shape {tuple(self.kv_num_blocks.shape)}, got "
                f"{tuple(self.full_kv_num_blocks.shape)}; count the full entries of every row"
            )
        shape = self.kv_indices.shape
        if len(shape) != 4 or self.kv_num_blocks.shape != shape[:3] or shape[2] != self.nq or shape[3] < 1:
            raise DitAttnError(
                f"BlockLayout needs kv_indices (B|1, H|1, {self.nq}, kcap) and kv_num_blocks (B|1, H|1, {self.nq}), "
                f"got {tuple(shape)} and {tuple(self.kv_num_blocks.shape)}; build it with a from_... constructor"
            )
        for name in ("kv_indices", "kv_num_blocks", "full_kv_num_blocks"):
            x = getattr(self, name)
            if x is not None and (x.dtype != torch.int32 or x.device != self.kv_indices.device):
                raise DitAttnError(
                    f"BlockLayout needs {name} to be int32 on the device of kv_indices, {self.kv_indices.device}, "
                    f"got {dtype_name(x.dtype)} on {x.device}; use {name}.to(torch.int32)"
                )

    # -- constructors ------------------------------------------------------------------------------------------------

    @classmethod
    def dense(
        cls,
        q_len: int,
        kv_len: int,
        q_block: int = 128,
        kv_block: int = 128,
        device: torch.device | str | None = None,
    ) -> BlockLayout:
        """Build the layout in which every query block attends to every key block; cached by its arguments.

        Args:
            q_len, kv_len: tokens.
            q_block, kv_block: tokens per block.
            device: where the lists are; by default torch's default device.
        """
        check_sizes(q_len=q_len, kv_len=kv_len, q_block=q_block, kv_block=kv_block)
        where = torch.get_default_device() if device is None else torch.device(device)
        return _dense(q_len, kv_len, q_block, kv_block, where)

    @classmethod
    def from_mask(cls, mask: torch.Tensor, q_len: int, kv_len: int, q_block: int, kv_block: int) -> BlockLayout:
        """Build a layout from a block mask.

        Args:
            mask: (B|1, H|1, nq, nk) bool, True where the query block attends to the key block.
            q_len, kv_len: tokens.
            q_block, kv_block: tokens per block.

        Raises:
            DitAttnError: the mask is not boolean, or its shape does not fit the lengths.
        """
        check_blocks("mask", mask, q_len, kv_len, q_block, kv_block, torch.bool)
        nk = mask.shape[-1]
        candidates = torch.where(mask, torch.arange(nk, device=mask.device), nk)
        return cls.from_candidates(candidates, mask.sum(-1), q_len, kv_len, q_block, kv_block)

    @classmethod
    def from_topk(
        cls,
        scores: torch.Tensor,
        k: int | torch.Tensor,
        forced: torch.Tensor | None = None,
        *,
        q_len: int,
        kv_len: int,
        q_block: int,
        kv_block: int,
    ) -> BlockLayout:
        """Build a layout of the ``k`` best key blocks of every query block; of equal scores the lower index wins.

        Args:
            scores: (B, H, nq, nk) fp32; a block of score ``-inf`` is never chosen.
            k: key blocks per query block, clamped to [1, nk]. A 0-d int64 tensor may change its value without a new
                compilation; the lists are then nk wide.
            forced: bool, expands to the shape of ``scores``: blocks chosen whatever their score. They count towards
                ``k``; a row with more than ``k`` of them gets all of them and no other.
            q_len, kv_len: tokens.
            q_block, kv_block: tokens per block.

        Raises:
            DitAttnError: ``scores`` or ``forced`` does not fit the sizes, or ``k`` is no whole number.
        """
        check_blocks("scores", scores, q_len, kv_len, q_block, kv_block)
        check_choices(tuple(scores.shape), forced)
        if not isinstance(k, torch.Tensor) and not is_whole(k, k):
            raise DitAttnError(f"k is a number of key blocks, got {k!r}; for a fraction use select_blocks(density=...)")
        return cls.from_candidates(*top_k_blocks(scores, k, forced), q_len, kv_len, q_block, kv_block)

    @classmethod
    def from_topp(
        cls,
        scores: torch.Tensor,
        p: float | torch.Tensor,
        k_min: int = 1,
        forced: torch.Tensor | None = None,
        *,
        q_len: int,
        kv_len: int,
        q_block: int,
        kv_block: int,
    ) -> BlockLayout:
        """Build a layout of the fewest key blocks whose softmax mass reaches ``p``; ties go to the lower index.

        Args:
            scores: (B, H, nq, nk) fp32 logits; a block of score ``-inf`` is never chosen.
            p: mass in (0, 1]; 1 chooses every block. The value of a 0-d tensor on a device is not checked.
            k_min: smallest number of blocks per row.
            forced: bool, expands to the shape of ``scores``: blocks chosen whatever their score; their mass counts
                first.
            q_len, kv_len: tokens.
            q_block, kv_block: tokens per block.

        Raises:
            DitAttnError: ``scores`` or ``forced`` does not fit the sizes, or ``p`` is out of (0, 1].
        """
        check_blocks("scores", scores, q_len, kv_len, q_block, kv_block)
        check_choices(tuple(scores.shape), forced)
        unknown = isinstance(p, torch.Tensor) and not host_readable(p)
        if not unknown and not 0.0 < p <= 1.0:
            raise DitAttnError(f"p is a fraction of the softmax mass in (0, 1], got {p}; 0.9 keeps 90 % of it")
        return cls.from_candidates(*top_p_blocks(scores, p, k_min, forced), q_len, kv_len, q_block, kv_block)

    @classmethod
    def from_candidates(
        cls, candidates: torch.Tensor, count: torch.Tensor, q_len: int, kv_len: int, q_block: int, kv_block: int
    ) -> BlockLayout:
        """Build a layout from chosen block numbers; arguments are not checked.

        Args:
            candidates: (B|1, H|1, nq, m) int64 block numbers in any order, ``nk`` where there is none.
            count: (B|1, H|1, nq), how many of a row are real.
            q_len, kv_len: tokens.
            q_block, kv_block: tokens per block.
        """
        uniform = None
        idx = candidates.sort(-1).values
        if host_readable(count):
            low, high = int(count.min()), int(count.max())
            uniform = high if low == high else None
            idx = idx[..., : max(high, 1)]
        nk = ceil_div(kv_len, kv_block)
        idx = torch.where(idx < nk, idx, 0).to(torch.int32).contiguous()
        return cls(q_block, kv_block, q_len, kv_len, idx, count.to(torch.int32), uniform)

    @classmethod
    def from_parts(
        cls,
        full: torch.Tensor,
        partial: torch.Tensor,
        elements: ElementMask,
        q_len: int,
        kv_len: int,
        q_block: int,
        kv_block: int,
    ) -> BlockLayout:
        """Build a layout from two block masks: full blocks, and partial ones whose pairs follow ``elements``.

        Args:
            full, partial: (B|1, H|1, nq, nk) bool; a block in both is full.
            elements: the rule of the partial blocks.
            q_len, kv_len: tokens.
            q_block, kv_block: tokens per block.
        """
        for name, mask in (("full", full), ("partial", partial)):
            check_blocks(name, mask, q_len, kv_len, q_block, kv_block, torch.bool)
        partial = partial & ~full
        if host_readable(partial) and not bool(partial.any()):
            return cls.from_mask(full, q_len, kv_len, q_block, kv_block)
        idx, count, full_count = full_then_partial(full, partial)
        sizes = (q_block, kv_block, q_len, kv_len)
        return cls(*sizes, idx, count, full_kv_num_blocks=full_count, elements=elements)

    # -- properties --------------------------------------------------------------------------------------------------

    @property
    def nq(self) -> int:
        """Number of query blocks, ``ceil(q_len / q_block)``."""
        return ceil_div(self.q_len, self.q_block)

    @property
    def nk(self) -> int:
        """Number of key blocks, ``ceil(kv_len / kv_block)``."""
        return ceil_div(self.kv_len, self.kv_block)

    @property
    def is_dense(self) -> bool:
        """Whether every query is known to attend to every key, without reading a device."""
        return self.uniform == self.nk and self.elements is None

    @property
    def density(self) -> float:
        """Computed tiles over all tiles; ragged and partial ones count as one. Synchronises with an accelerator."""
        return float(self.kv_num_blocks.sum(dtype=torch.int64)) / (self.kv_num_blocks.numel() * self.nk)

    @property
    def token_density(self) -> float:
        """Attended (query, key) pairs over all pairs, exact. Synchronises with an accelerator."""
        queries = _block_tokens(self.q_len, self.q_block, self.kv_num_blocks.device)
        keys = _block_tokens(self.kv_len, self.kv_block, self.kv_num_blocks.device)
        pairs = float(((self.full_mask().double() @ keys) * queries).sum())
        pairs += sum(float(attended.sum(dtype=torch.int64)) for *_, attended in self.partial_blocks())
        return pairs / (self.kv_num_blocks.shape[0] * self.kv_num_blocks.shape[1] * self.q_len * self.kv_len)

    def valid(self) -> torch.Tensor:
        """Return (B|1, H|1, nq, kcap) bool, True for the entries of ``kv_indices`` below the row's count."""
        return torch.arange(self.kv_indices.shape[-1], device=self.kv_indices.device) < self.kv_num_blocks[..., None]

    def block_mask(self) -> torch.Tensor:
        """Return (B|1, H|1, nq, nk) bool, True for blocks that are attended to, fully or partially."""
        return self._scattered(self.valid())

    def full_mask(self) -> torch.Tensor:
        """Return (B|1, H|1, nq, nk) bool, True for full blocks."""
        if self.full_kv_num_blocks is None:
            return self.block_mask()
        places = torch.arange(self.kv_indices.shape[-1], device=self.kv_indices.device)
        return self._scattered(places < self.full_kv_num_blocks[..., None])

    def _scattered(self, chosen: torch.Tensor) -> torch.Tensor:
        mask = torch.zeros(*self.kv_num_blocks.shape, self.nk + 1, dtype=torch.bool, device=self.kv_indices.device)
        target = torch.where(chosen, self.kv_indices.long(), self.nk)  # what is not chosen lands in a spare column
        return mask.scatter(-1, target, True)[..., : self.nk]

    def partial_blocks(self, at_once: int = 256) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Iterate over the partial blocks with their pairs. Synchronises with an accelerator.

        Args:
            at_once: blocks per item, at most.

        Yields:
            batch row; (n, 3) int64 of head, query block and key block; (n, q_block, kv_block) bool, True for pairs
            that are attended to, False past the ends of the sequences.
        """
        if self.elements is None or self.full_kv_num_blocks is None:
            return
        places = torch.arange(self.kv_indices.shape[-1], device=self.kv_indices.device)
        partial = (places >= self.full_kv_num_blocks[..., None]) & self.valid()
        for batch in range(partial.shape[0]):
            for chosen in partial[batch].nonzero().split(at_once):
                heads, rows, entries = chosen.unbind(1)
                columns = self.kv_indices[batch, heads, rows, entries].long()
                entries = entries - self.full_kv_num_blocks[batch, heads, rows]
                tiles = Tiles(
                    batch, heads, rows, columns[:, None], entries[:, None], self.q_block, self.q_block, self.kv_block
                )
                attended = self.elements.allowed_pairs(tiles)
                q = rows[:, None] * self.q_block + torch.arange(self.q_block, device=rows.device)
                k = columns[:, None] * self.kv_block + torch.arange(self.kv_block, device=rows.device)
                attended = attended & (q < self.q_len)[:, :, None] & (k < self.kv_len)[:, None]
                yield batch, torch.stack([heads, rows, columns], 1), attended

    def materialize(self) -> torch.Tensor:
        """Return the token-level mask (B|1, H|1, Sq, Sk) bool. Takes S x S memory: for tests and drawings."""
        mask = self.full_mask().repeat_interleave(self.q_block, -2).repeat_interleave(self.kv_block, -1)
        for batch, places, attended in self.partial_blocks():
            for (head, row, column), pairs in zip(places.tolist(), attended):
                q, k = row * self.q_block, column * self.kv_block
                mask[batch, head, q : q + self.q_block, k : k + self.kv_block] = pairs
        return mask[..., : self.q_len, : self.kv_len]

    def reverse_lists(self) -> ReverseLists:
        """Return the lists of the backward pass: query blocks of every key block; built once per layout."""
        return self._reverse_lists

    @cached_property
    def _reverse_lists(self) -> ReverseLists:
        return reverse_lists(self.block_mask(), self.full_mask(), self.elements)

    def check(self) -> BlockLayout:
        """Check the lists and return the layout itself. Synchronises with an accelerator.

        Raises:
            DitAttnError: a count out of range, or a list that is not ascending within the key blocks.
        """
        kcap = self.kv_indices.shape[-1]
        if bool(((self.kv_num_blocks < 0) | (self.kv_num_blocks > kcap)).any()):
            raise DitAttnError(f"kv_num_blocks must lie in [0, {kcap}], the width of kv_indices; count again")
        full = self.full_kv_num_blocks
        if full is not None and bool(((full < 0) | (full > self.kv_num_blocks)).any()):
            raise DitAttnError("full_kv_num_blocks must lie in [0, kv_num_blocks]: it counts the full entries")
        valid, idx = self.valid(), self.kv_indices
        if bool((valid & ((idx < 0) | (idx >= self.nk))).any()):
            raise DitAttnError(f"kv_indices must lie in [0, {self.nk}), the key blocks of {self.kv_len} tokens")
        falls = valid[..., 1:] & (idx[..., 1:] <= idx[..., :-1])
        if full is not None:  # the partial entries ascend anew
            falls &= torch.arange(1, kcap, device=idx.device) != full[..., None]
        twice = self.block_mask().sum(-1) != self.kv_num_blocks
        if bool(falls.any()) or bool(twice.any()):
            raise DitAttnError("kv_indices must ascend within each row, every block once; sort it")
        self.check_elements()
        if isinstance(self.elements, BitMask) and full is not None:
            most, stored = int((self.kv_num_blocks - full).max()), self.elements.bits.shape[3]
            if most > stored:
                raise DitAttnError(
                    f"elements has bits for {stored} partial blocks a row, and a row has {most}; pack the bits of all"
                )
        return self

    def check_elements(self) -> None:
        """Check that the tables of the element mask fit the lists, without reading a device.

        Raises:
            DitAttnError: they are of other sizes, or on another device.
        """
        if self.elements is None:
            return
        wrong = self.elements.size_mismatch(self.q_len, self.kv_len, self.q_block, self.kv_block)
        if wrong is None and any(x is not None and x.device != self.kv_indices.device for x in self.elements.tensors()):
            wrong = f"they are not on {self.kv_indices.device}, where the lists are"
        if wrong is not None:
            raise DitAttnError(f"elements do not fit the layout: {wrong}; build them for the same tokens and blocks")

    def of_heads(self, heads: slice) -> BlockLayout:
        """Return the layout of some of the query heads; shares memory."""
        if self.kv_num_blocks.shape[1] == 1:
            return self
        full = None if self.full_kv_num_blocks is None else self.full_kv_num_blocks[:, heads]
        elements = None if self.elements is None else self.elements.of_heads(heads)
        sizes = (self.q_block, self.kv_block, self.q_len, self.kv_len)
        lists = (self.kv_indices[:, heads], self.kv_num_blocks[:, heads])
        return BlockLayout(*sizes, *lists, self.uniform, full, elements)

    def to(self, device: torch.device | str) -> BlockLayout:
        """Return the layout on another device."""
        lists = (self.kv_indices.to(device), self.kv_num_blocks.to(device))
        full = None if self.full_kv_num_blocks is None else self.full_kv_num_blocks.to(device)
        elements = None if self.elements is None else self.elements.to(device)
        sizes = (self.q_block, self.kv_block, self.q_len, self.kv_len)
        return BlockLayout(*sizes, *lists, self.uniform, full, elements)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, BlockLayout):
            return NotImplemented
        ours = (self.q_block, self.kv_block, self.q_len, self.kv_len, self.kv_num_blocks.shape)
        theirs = (other.q_block, other.kv_block, other.q_len, other.kv_len, other.kv_num_blocks.shape)
        return (
            ours == theirs
            and torch.equal(self.block_mask(), other.block_mask())
            and torch.equal(self.full_mask(), other.full_mask())
            and (self.elements is other.elements or (self.elements is not None and self.elements.same(other.elements)))
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        batch, heads = self.kv_num_blocks.shape[:2]
        rule = "" if self.elements is None else f", {type(self.elements).__name__}"
        return (
            f"BlockLayout({self.q_len} x {self.kv_len} tokens, {self.nq} x {self.nk} blocks of "
            f"{self.q_block} x {self.kv_block}, batch {batch}, heads {heads}, density {self.density:.3f}{rule})"
        )


@cached
def _dense(q_len: int, kv_len: int, q_block: int, kv_block: int, device: torch.device) -> BlockLayout:
    nq, nk = ceil_div(q_len, q_block), ceil_div(kv_len, kv_block)
    idx = torch.arange(nk, dtype=torch.int32, device=device).expand(1, 1, nq, nk).contiguous()
    cnt = torch.full((1, 1, nq), nk, dtype=torch.int32, device=device)
    return BlockLayout(q_block, kv_block, q_len, kv_len, idx, cnt, nk)


def _block_tokens(seq: int, block: int, device: torch.device) -> torch.Tensor:
    """(n,) fp64, the tokens of every block."""
    tokens = torch.full((ceil_div(seq, block),), float(block), dtype=torch.float64, device=device)
    tokens[-1] -= len(tokens) * block - seq
    return tokens


def selected_bits(layout: BlockLayout) -> torch.Tensor:
    """Pack the block mask: (B|1, H|1, nq, ceil(nk / 32)) int32, bit ``j % 32`` of word ``j // 32`` for key block j."""
    return pack_bits(layout.block_mask())
