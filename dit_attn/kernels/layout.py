"""Which key blocks each query block reads: one small object, never a map of S x S."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch

from dit_attn.errors import DitAttnError
from dit_attn.kernels.checks import check_blocks, check_choices, check_sizes, dtype_name, is_whole
from dit_attn.kernels.kept import kept
from dit_attn.kernels.masks import BitMask, ElementMask, Tiles


def ceil_div(a: int, b: int) -> int:
    """``ceil(a / b)`` for non-negative ints."""
    return -(-a // b)


def readable(x: torch.Tensor) -> bool:
    """Whether the host can read ``x`` for free: it lives there and nothing is being traced."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


@dataclass(frozen=True)
class Transposed:
    """The lists the other way round: which query blocks read each key block.

    Attributes:
        q_idx: (B|1, H|1, nk, qcap) int32, query blocks that read the key block whole, ascending, then those that read
            it in part, ascending.
        q_cnt: (B|1, H|1, nk) int32.
        n_full: (B|1, H|1, nk) int32, how many read it whole; ``None`` when all do.
        entry: (B|1, H|1, nk, qcap) int32, which of the query block's partial entries the key block is; with bits only.
    """

    q_idx: torch.Tensor
    q_cnt: torch.Tensor
    n_full: torch.Tensor | None
    entry: torch.Tensor | None = None


@dataclass(frozen=True, eq=False, repr=False)
class BlockLayout:
    """A block-sparse attention pattern in ELL form.

    ::

        keys      0    1    2    3          kv_idx        kv_cnt
        queries                             [0 1 .]       2
           0      #    #    .    .          [1 2 3]       3
           1      .    #    #    #          [3 . .]       1
           2      .    .    .    #

    Attributes:
        q_block: tokens per query block.
        kv_block: tokens per key block.
        q_len: number of queries, Sq; the last block may be ragged.
        kv_len: number of keys, Sk; the last block may be ragged.
        kv_idx: (B|1, H|1, nq, kcap) int32, ascending in each row (first the blocks read whole, then those read in part,
            each ascending); entries at or past the count are not read.
        kv_cnt: (B|1, H|1, nq) int32, number of key blocks each query block reads.
        uniform: the count when every row is known to have the same one, without reading a device; else ``None``.
        n_full: (B|1, H|1, nq) int32, how many entries of a row are read whole; ``None`` when all are.
        elements: which pairs of the other entries are read; ``None`` when there are none.

    Raises:
        DitAttnError: a size below 1, or tensors whose shapes do not fit the sizes.
    """

    q_block: int
    kv_block: int
    q_len: int
    kv_len: int
    kv_idx: torch.Tensor
    kv_cnt: torch.Tensor
    uniform: int | None = None
    n_full: torch.Tensor | None = None
    elements: ElementMask | None = None

    def __post_init__(self) -> None:
        check_sizes(q_len=self.q_len, kv_len=self.kv_len, q_block=self.q_block, kv_block=self.kv_block)
        if (self.n_full is None) != (self.elements is None):
            raise DitAttnError("BlockLayout needs n_full and elements together, or neither; see from_parts")
        if self.n_full is not None and self.n_full.shape != self.kv_cnt.shape:
            raise DitAttnError(
                f"BlockLayout needs n_full of kv_cnt's shape {tuple(self.kv_cnt.shape)}, got {tuple(self.n_full.shape)}"
            )
        shape = self.kv_idx.shape
        if len(shape) != 4 or self.kv_cnt.shape != shape[:3] or shape[2] != self.nq or shape[3] < 1:
            raise DitAttnError(
                f"BlockLayout needs kv_idx (B|1, H|1, {self.nq}, kcap) and kv_cnt (B|1, H|1, {self.nq}), "
                f"got {tuple(shape)} and {tuple(self.kv_cnt.shape)}; build it with a from_... constructor"
            )
        for name in ("kv_idx", "kv_cnt", "n_full"):
            x = getattr(self, name)
            if x is not None and (x.dtype != torch.int32 or x.device != self.kv_idx.device):
                raise DitAttnError(
                    f"BlockLayout needs {name} to be int32 on the device of kv_idx, {self.kv_idx.device}, "
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
        """Every query block reads every key block; kept for the next call with the same arguments."""
        check_sizes(q_len=q_len, kv_len=kv_len, q_block=q_block, kv_block=kv_block)
        where = torch.get_default_device() if device is None else torch.device(device)
        return _dense(q_len, kv_len, q_block, kv_block, where)

    @classmethod
    def from_mask(cls, mask: torch.Tensor, q_len: int, kv_len: int, q_block: int, kv_block: int) -> BlockLayout:
        """From a block mask.

        Args:
            mask: (B|1, H|1, nq, nk) bool, True where the query block reads the key block.
            q_len, kv_len: tokens.
            q_block, kv_block: tokens per block.

        Raises:
            DitAttnError: the mask is not boolean, or its shape does not fit the lengths.
        """
        check_blocks("mask", mask, q_len, kv_len, q_block, kv_block, torch.bool)
        nk = mask.shape[-1]
        candidates = torch.where(mask, torch.arange(nk, device=mask.device), nk)
        return cls._pack(candidates, mask.sum(-1), q_len, kv_len, q_block, kv_block)

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
        """The ``k`` best key blocks of every query block; on equal scores the lower index wins.

        Args:
            scores: (B, H, nq, nk) fp32; a block of score ``-inf`` is never chosen.
            k: key blocks per query block, clamped to [1, nk]. As a 0-d int64 tensor it leaves a compiled graph as it is
                when it changes; the lists are then nk wide.
            forced: broadcastable bool, blocks that are kept whatever their score. They count against ``k`` first; a
                row with more forced blocks than ``k`` keeps them all and nothing else.
            q_len, kv_len: tokens.
            q_block, kv_block: tokens per block.
        """
        check_blocks("scores", scores, q_len, kv_len, q_block, kv_block)
        check_choices(tuple(scores.shape), forced)
        if not isinstance(k, torch.Tensor) and not is_whole(k, k):
            raise DitAttnError(f"k is a number of key blocks, got {k!r}; for a share use select_blocks(density=...)")
        nk = scores.shape[-1]
        cap = nk if forced is not None or isinstance(k, torch.Tensor) else max(1, min(k, nk))
        least = k.to(scores.device).clamp(1, nk) if isinstance(k, torch.Tensor) else max(1, min(k, nk))
        order, fixed, available = _ranking(scores, forced)
        count = available.clamp(max=least) if fixed is None else torch.minimum(fixed.clamp(min=least), available)
        places = torch.arange(nk, device=scores.device)
        candidates = torch.where(places < count[..., None], order, nk)
        return cls._pack(candidates[..., :cap], count, q_len, kv_len, q_block, kv_block)

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
        """The fewest key blocks whose softmax mass reaches ``p``; on equal scores the lower index wins.

        Args:
            scores: (B, H, nq, nk) fp32 logits; a block of score ``-inf`` is never chosen.
            p: mass in (0, 1]; 1 keeps every block. A 0-d tensor on a device is not read, so not checked.
            k_min: smallest number of blocks per row.
            forced: broadcastable bool, blocks that are kept whatever their score; their mass counts first.
            q_len, kv_len: tokens.
            q_block, kv_block: tokens per block.
        """
        check_blocks("scores", scores, q_len, kv_len, q_block, kv_block)
        check_choices(tuple(scores.shape), forced)
        unread = isinstance(p, torch.Tensor) and not readable(p)
        if not unread and not 0.0 < p <= 1.0:
            raise DitAttnError(f"p is a share of the softmax mass in (0, 1], got {p}")
        order, fixed, available = _ranking(scores, forced)
        mass = torch.softmax(scores.float(), -1).gather(-1, order)
        least = torch.full_like(available, max(1, k_min)) if fixed is None else fixed.clamp(min=max(1, k_min))
        # A block is needed while the mass before it is short of p; the sum may round, so p = 1 is said outright.
        needed = available
        if isinstance(p, torch.Tensor):
            p = p.to(scores.device)
            needed = torch.where(p < 1.0, (mass.cumsum(-1) - mass < p).sum(-1), available)
        elif p < 1.0:
            needed = (mass.cumsum(-1) - mass < p).sum(-1)
        count = torch.minimum(torch.maximum(needed, least), available)
        places = torch.arange(scores.shape[-1], device=scores.device)
        candidates = torch.where(places < count[..., None], order, scores.shape[-1])
        return cls._pack(candidates, count, q_len, kv_len, q_block, kv_block)

    @classmethod
    def _pack(
        cls, candidates: torch.Tensor, count: torch.Tensor, q_len: int, kv_len: int, q_block: int, kv_block: int
    ) -> BlockLayout:
        """From (..., nq, m) block numbers in any order, ``nk`` standing for "none", of which ``count`` are real."""
        uniform = None
        idx = candidates.sort(-1).values
        if readable(count):
            low, high = int(count.min()), int(count.max())
            uniform = high if low == high else None
            idx = idx[..., : max(high, 1)]
        nk = ceil_div(kv_len, kv_block)
        idx = torch.where(idx < nk, idx, 0).to(torch.int32).contiguous()
        return cls(q_block, kv_block, q_len, kv_len, idx, count.to(torch.int32), uniform)

    @classmethod
    def from_parts(
        cls,
        whole: torch.Tensor,
        partial: torch.Tensor,
        elements: ElementMask,
        q_len: int,
        kv_len: int,
        q_block: int,
        kv_block: int,
    ) -> BlockLayout:
        """From two block masks: blocks that are read whole, and blocks of which ``elements`` says what is read.

        Args:
            whole, partial: (B|1, H|1, nq, nk) bool; a block in both is read whole.
            elements: the rule for the partial ones.
            q_len, kv_len: tokens.
            q_block, kv_block: tokens per block.
        """
        for name, mask in (("whole", whole), ("partial", partial)):
            check_blocks(name, mask, q_len, kv_len, q_block, kv_block, torch.bool)
        partial = partial & ~whole
        if readable(partial) and not bool(partial.any()):
            return cls.from_mask(whole, q_len, kv_len, q_block, kv_block)
        idx, count, n_full = _two_runs(whole, partial)
        return cls(q_block, kv_block, q_len, kv_len, idx, count, n_full=n_full, elements=elements)

    # -- facts -------------------------------------------------------------------------------------------------------

    @property
    def nq(self) -> int:
        """Number of query blocks."""
        return ceil_div(self.q_len, self.q_block)

    @property
    def nk(self) -> int:
        """Number of key blocks."""
        return ceil_div(self.kv_len, self.kv_block)

    @property
    def is_dense(self) -> bool:
        """Whether every pair is known to be read, without reading a device."""
        return self.uniform == self.nk and self.elements is None

    @property
    def density(self) -> float:
        """Executed tiles over all tiles, ragged and partial ones counted whole. Synchronises with an accelerator."""
        return float(self.kv_cnt.sum(dtype=torch.int64)) / (self.kv_cnt.numel() * self.nk)

    @property
    def token_density(self) -> float:
        """Attended (query, key) pairs over all pairs, exact. Synchronises with an accelerator."""
        queries = _block_tokens(self.q_len, self.q_block, self.kv_cnt.device)
        keys = _block_tokens(self.kv_len, self.kv_block, self.kv_cnt.device)
        pairs = float(((self.full_mask().double() @ keys) * queries).sum())
        pairs += sum(float(read.sum(dtype=torch.int64)) for *_, read in self.partial_blocks())
        return pairs / (self.kv_cnt.shape[0] * self.kv_cnt.shape[1] * self.q_len * self.kv_len)

    def valid(self) -> torch.Tensor:
        """(B|1, H|1, nq, kcap) bool, the entries of ``kv_idx`` that are read."""
        return torch.arange(self.kv_idx.shape[-1], device=self.kv_idx.device) < self.kv_cnt[..., None]

    def block_mask(self) -> torch.Tensor:
        """(B|1, H|1, nq, nk) bool, blocks that are read, whole or in part."""
        return self._scattered(self.valid())

    def full_mask(self) -> torch.Tensor:
        """(B|1, H|1, nq, nk) bool, blocks that are read whole."""
        if self.n_full is None:
            return self.block_mask()
        return self._scattered(torch.arange(self.kv_idx.shape[-1], device=self.kv_idx.device) < self.n_full[..., None])

    def _scattered(self, chosen: torch.Tensor) -> torch.Tensor:
        mask = torch.zeros(*self.kv_cnt.shape, self.nk + 1, dtype=torch.bool, device=self.kv_idx.device)
        target = torch.where(chosen, self.kv_idx.long(), self.nk)  # what is not chosen lands in a spare column
        return mask.scatter(-1, target, True)[..., : self.nk]

    def partial_blocks(self, at_once: int = 256) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Blocks read in part, some at a time: batch row, (n, 3) of head, query block and key block, what is read.

        The last is (n, q_block, kv_block) bool, False past the ends of the sequences. Synchronises with an accelerator.
        """
        if self.elements is None or self.n_full is None:
            return
        places = torch.arange(self.kv_idx.shape[-1], device=self.kv_idx.device)
        partial = (places >= self.n_full[..., None]) & self.valid()
        for batch in range(partial.shape[0]):
            for chosen in partial[batch].nonzero().split(at_once):
                heads, rows, entries = chosen.unbind(1)
                columns = self.kv_idx[batch, heads, rows, entries].long()
                entries = entries - self.n_full[batch, heads, rows]
                tiles = Tiles(
                    batch, heads, rows, columns[:, None], entries[:, None], self.q_block, self.q_block, self.kv_block
                )
                read = self.elements.read(tiles)
                q = rows[:, None] * self.q_block + torch.arange(self.q_block, device=rows.device)
                k = columns[:, None] * self.kv_block + torch.arange(self.kv_block, device=rows.device)
                read = read & (q < self.q_len)[:, :, None] & (k < self.kv_len)[:, None]
                yield batch, torch.stack([heads, rows, columns], 1), read

    def materialize(self) -> torch.Tensor:
        """(B|1, H|1, Sq, Sk) bool, the token-level mask. S x S memory: for tests and pictures."""
        mask = self.full_mask().repeat_interleave(self.q_block, -2).repeat_interleave(self.kv_block, -1)
        for batch, places, read in self.partial_blocks():
            for (head, row, column), pairs in zip(places.tolist(), read):
                q, k = row * self.q_block, column * self.kv_block
                mask[batch, head, q : q + self.q_block, k : k + self.kv_block] = pairs
        return mask[..., : self.q_len, : self.kv_len]

    def transposed(self) -> Transposed:
        """The lists of the backward pass; made once."""
        return self._transposed

    @cached_property
    def _transposed(self) -> Transposed:
        read = self.block_mask().transpose(-1, -2)
        whole = self.full_mask().transpose(-1, -2) if self.elements is not None else read
        idx, count, n_full = _two_runs(whole, read & ~whole)
        if self.elements is None:
            return Transposed(idx, count, None)
        entry = None
        if isinstance(self.elements, BitMask):
            entry = ((read & ~whole).cumsum(-2, dtype=torch.int32) - 1).clamp(min=0).gather(-1, idx.long())
        return Transposed(idx, count, n_full, entry)

    def check(self) -> BlockLayout:
        """Itself, once its lists are known to be good. Synchronises with an accelerator.

        Raises:
            DitAttnError: a count out of range, or a list that is not ascending within the key blocks.
        """
        kcap = self.kv_idx.shape[-1]
        if bool(((self.kv_cnt < 0) | (self.kv_cnt > kcap)).any()):
            raise DitAttnError(f"kv_cnt must lie in [0, {kcap}], the width of kv_idx")
        if self.n_full is not None and bool(((self.n_full < 0) | (self.n_full > self.kv_cnt)).any()):
            raise DitAttnError("n_full must lie in [0, kv_cnt]: it counts the first entries of each row")
        valid, idx = self.valid(), self.kv_idx
        if bool((valid & ((idx < 0) | (idx >= self.nk))).any()):
            raise DitAttnError(f"kv_idx must lie in [0, {self.nk}), the key blocks of {self.kv_len} tokens")
        falls = valid[..., 1:] & (idx[..., 1:] <= idx[..., :-1])
        if self.n_full is not None:  # the partial entries ascend anew
            falls &= torch.arange(1, kcap, device=idx.device) != self.n_full[..., None]
        twice = self.block_mask().sum(-1) != self.kv_cnt
        if bool(falls.any()) or bool(twice.any()):
            raise DitAttnError("kv_idx must ascend within each row, every block once; sort it")
        self.check_elements()
        if isinstance(self.elements, BitMask) and self.n_full is not None:
            most, held = int((self.kv_cnt - self.n_full).max()), self.elements.bits.shape[3]
            if most > held:
                raise DitAttnError(f"elements hold bits of {held} blocks a row, and a row reads {most} in part")
        return self

    def check_elements(self) -> None:
        """Raises DitAttnError unless the tables of the element mask fit the lists. Reads no device."""
        if self.elements is None:
            return
        wrong = self.elements.misfit(self.q_len, self.kv_len, self.q_block, self.kv_block)
        if wrong is None and any(x is not None and x.device != self.kv_idx.device for x in self.elements.tensors()):
            wrong = f"they are not on {self.kv_idx.device}, where its lists are"
        if wrong is not None:
            raise DitAttnError(f"elements do not fit the layout: {wrong}; make them for the same tokens and blocks")

    def of_heads(self, heads: slice) -> BlockLayout:
        """The same layout for some of the query heads; shares memory."""
        if self.kv_cnt.shape[1] == 1:
            return self
        n_full = None if self.n_full is None else self.n_full[:, heads]
        elements = None if self.elements is None else self.elements.of_heads(heads)
        sizes = (self.q_block, self.kv_block, self.q_len, self.kv_len)
        return BlockLayout(*sizes, self.kv_idx[:, heads], self.kv_cnt[:, heads], self.uniform, n_full, elements)

    def to(self, device: torch.device | str) -> BlockLayout:
        """The same layout on another device."""
        idx, cnt = self.kv_idx.to(device), self.kv_cnt.to(device)
        n_full = None if self.n_full is None else self.n_full.to(device)
        elements = None if self.elements is None else self.elements.to(device)
        sizes = (self.q_block, self.kv_block, self.q_len, self.kv_len)
        return BlockLayout(*sizes, idx, cnt, self.uniform, n_full, elements)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, BlockLayout):
            return NotImplemented
        ours = (self.q_block, self.kv_block, self.q_len, self.kv_len, self.kv_cnt.shape)
        theirs = (other.q_block, other.kv_block, other.q_len, other.kv_len, other.kv_cnt.shape)
        return (
            ours == theirs
            and torch.equal(self.block_mask(), other.block_mask())
            and torch.equal(self.full_mask(), other.full_mask())
            and (self.elements is other.elements or (self.elements is not None and self.elements.same(other.elements)))
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        batch, heads = self.kv_cnt.shape[:2]
        rule = "" if self.elements is None else f", {type(self.elements).__name__}"
        return (
            f"BlockLayout({self.q_len} x {self.kv_len} tokens, {self.nq} x {self.nk} blocks of "
            f"{self.q_block} x {self.kv_block}, batch {batch}, heads {heads}, density {self.density:.3f}{rule})"
        )


@kept
def _dense(q_len: int, kv_len: int, q_block: int, kv_block: int, device: torch.device) -> BlockLayout:
    nq, nk = ceil_div(q_len, q_block), ceil_div(kv_len, kv_block)
    idx = torch.arange(nk, dtype=torch.int32, device=device).expand(1, 1, nq, nk).contiguous()
    cnt = torch.full((1, 1, nq), nk, dtype=torch.int32, device=device)
    return BlockLayout(q_block, kv_block, q_len, kv_len, idx, cnt, nk)


def _two_runs(whole: torch.Tensor, partial: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Lists, counts and full counts of (..., rows, n) block masks that do not overlap: both runs ascending."""
    n = whole.shape[-1]
    place = torch.arange(n, device=whole.device, dtype=torch.int32)
    order = torch.where(whole, place, torch.where(partial, place + n, 2 * n)).sort(-1).values
    n_full = whole.sum(-1)
    count = n_full + partial.sum(-1)
    if readable(count):
        order = order[..., : max(int(count.max()), 1)]
    idx = torch.where(order < 2 * n, order % n, 0).to(torch.int32).contiguous()
    return idx, count.to(torch.int32), n_full.to(torch.int32)


def _ranking(
    scores: torch.Tensor, forced: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Block numbers from best to worst, forced ones first, ties by index; forced and choosable blocks per row."""
    choosable = scores != float("-inf")
    fixed = None
    if forced is not None:
        forced = forced.expand_as(scores)
        choosable, fixed = choosable | forced, forced.sum(-1)
        scores = scores.masked_fill(forced, float("inf"))
    return torch.sort(scores, dim=-1, descending=True, stable=True).indices, fixed, choosable.sum(-1)


def _block_tokens(seq: int, block: int, device: torch.device) -> torch.Tensor:
    """(n,) fp64, the tokens of every block."""
    tokens = torch.full((ceil_div(seq, block),), float(block), dtype=torch.float64, device=device)
    tokens[-1] -= len(tokens) * block - seq
    return tokens
