"""Which key blocks each query block reads: one small object, never a map of S x S."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dit_attn.errors import DitAttnError


def ceil_div(a: int, b: int) -> int:
    """``ceil(a / b)`` for non-negative ints."""
    return -(-a // b)


@dataclass(frozen=True, eq=False)
class BlockLayout:
    """A block-sparse attention pattern in ELL form.

    ::

        keys      0    1    2    3          kv_idx        kv_cnt
        queries                             [0 1 .]       2
           0      #    #    .    .          [1 2 3]       3
           1      .    #    #    #          [3 . .]       1
           2      .    .    .    #

    Attributes:
        kv_idx: (B|1, H|1, nq, kcap) int32, ascending in each row; entries at or past the count are undefined (0).
        kv_cnt: (B|1, H|1, nq) int32, number of key blocks each query block reads.
        q_block: tokens per query block.
        kv_block: tokens per key block.
        q_len: number of queries, Sq; the last block may be ragged.
        kv_len: number of keys, Sk; the last block may be ragged.
    """

    kv_idx: torch.Tensor
    kv_cnt: torch.Tensor
    q_block: int
    kv_block: int
    q_len: int
    kv_len: int

    def __post_init__(self) -> None:
        for name in ("q_block", "kv_block", "q_len", "kv_len"):
            if getattr(self, name) < 1:
                raise DitAttnError(f"BlockLayout.{name} must be at least 1, got {getattr(self, name)}")
        if self.kv_idx.ndim != 4 or self.kv_cnt.shape != self.kv_idx.shape[:3] or self.kv_idx.shape[2] != self.nq:
            raise DitAttnError(
                f"BlockLayout needs kv_idx (B|1, H|1, {self.nq}, kcap) and kv_cnt (B|1, H|1, {self.nq}), "
                f"got {tuple(self.kv_idx.shape)} and {tuple(self.kv_cnt.shape)}; build it with a from_... constructor"
            )

    # -- constructors ------------------------------------------------------------------------------------------------

    @classmethod
    def dense(cls, q_len: int, kv_len: int, q_block: int = 128, kv_block: int = 128) -> BlockLayout:
        """Every query block reads every key block."""
        nq, nk = ceil_div(q_len, q_block), ceil_div(kv_len, kv_block)
        idx = torch.arange(nk, dtype=torch.int32).expand(1, 1, nq, nk).contiguous()
        return cls(idx, torch.full((1, 1, nq), nk, dtype=torch.int32), q_block, kv_block, q_len, kv_len)

    @classmethod
    def from_mask(cls, mask: torch.Tensor, q_len: int, kv_len: int, q_block: int, kv_block: int) -> BlockLayout:
        """From a block mask.

        Args:
            mask: (B|1, H|1, nq, nk) bool, True where the query block reads the key block.
            q_len, kv_len: tokens.
            q_block, kv_block: tokens per block.

        Raises:
            DitAttnError: the mask's shape does not fit the lengths.
        """
        _check_blocks("mask", mask, q_len, kv_len, q_block, kv_block)
        count = mask.sum(-1, dtype=torch.int32)
        # Selected blocks first, both parts ascending: a stable sort of "not selected".
        order = torch.sort((~mask).to(torch.int8), dim=-1, stable=True).indices.to(torch.int32)
        # Reading the largest count is free on the host and a synchronisation elsewhere.
        kcap = max(int(count.max()), 1) if mask.device.type == "cpu" else mask.shape[-1]
        order = order[..., :kcap]
        valid = torch.arange(kcap, device=mask.device) < count[..., None]
        return cls(torch.where(valid, order, 0).contiguous(), count, q_block, kv_block, q_len, kv_len)

    @classmethod
    def from_topk(
        cls,
        scores: torch.Tensor,
        k: int,
        *,
        q_len: int,
        kv_len: int,
        q_block: int,
        kv_block: int,
        forced: torch.Tensor | None = None,
    ) -> BlockLayout:
        """The ``k`` best key blocks of every query block; on equal scores the lower index wins.

        Args:
            scores: (B, H, nq, nk) fp32.
            k: key blocks per query block, clamped to [1, nk].
            q_len, kv_len: tokens.
            q_block, kv_block: tokens per block.
            forced: broadcastable bool, blocks that are kept whatever their score; they count against ``k`` first, and
                a row with more forced blocks than ``k`` keeps them all.
        """
        _check_blocks("scores", scores, q_len, kv_len, q_block, kv_block)
        rank = _rank(scores, forced)
        mask = rank < max(1, min(k, scores.shape[-1]))
        if forced is not None:
            mask = mask | forced
        return cls.from_mask(mask, q_len, kv_len, q_block, kv_block)

    @classmethod
    def from_topp(
        cls,
        scores: torch.Tensor,
        p: float,
        *,
        q_len: int,
        kv_len: int,
        q_block: int,
        kv_block: int,
        k_min: int = 1,
        forced: torch.Tensor | None = None,
    ) -> BlockLayout:
        """The fewest key blocks whose softmax mass reaches ``p``, at least ``k_min``, joined with the forced ones.

        Args:
            scores: (B, H, nq, nk) fp32 logits.
            p: mass in (0, 1].
            q_len, kv_len: tokens.
            q_block, kv_block: tokens per block.
            k_min: smallest number of blocks per row.
            forced: broadcastable bool, blocks that are kept whatever their score.
        """
        _check_blocks("scores", scores, q_len, kv_len, q_block, kv_block)
        mass, order = torch.sort(torch.softmax(scores.float(), -1), dim=-1, descending=True, stable=True)
        before = mass.cumsum(-1) - mass
        keep = before < p
        keep[..., : max(1, k_min)] = True
        mask = torch.zeros_like(keep).scatter(-1, order, keep)
        if forced is not None:
            mask = mask | forced
        return cls.from_mask(mask, q_len, kv_len, q_block, kv_block)

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
    def density(self) -> float:
        """Executed tiles over all tiles, ragged ones counted whole. Synchronises with an accelerator."""
        return float(self.kv_cnt.sum(dtype=torch.int64)) / (self.kv_cnt.numel() * self.nk)

    def block_mask(self) -> torch.Tensor:
        """(B|1, H|1, nq, nk) bool."""
        kcap = self.kv_idx.shape[-1]
        valid = torch.arange(kcap, device=self.kv_idx.device) < self.kv_cnt[..., None]
        mask = torch.zeros(*self.kv_cnt.shape, self.nk + 1, dtype=torch.bool, device=self.kv_idx.device)
        target = torch.where(valid, self.kv_idx.long(), self.nk)  # undefined entries land in a spare column
        return mask.scatter(-1, target, True)[..., : self.nk]

    def materialize(self) -> torch.Tensor:
        """(B|1, H|1, Sq, Sk) bool, the token-level mask. S x S memory: for tests and pictures."""
        mask = self.block_mask().repeat_interleave(self.q_block, -2).repeat_interleave(self.kv_block, -1)
        return mask[..., : self.q_len, : self.kv_len]

    def to(self, device: torch.device | str) -> BlockLayout:
        """The same layout on another device."""
        idx, cnt = self.kv_idx.to(device), self.kv_cnt.to(device)
        return BlockLayout(idx, cnt, self.q_block, self.kv_block, self.q_len, self.kv_len)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, BlockLayout):
            return NotImplemented
        ours = (self.q_block, self.kv_block, self.q_len, self.kv_len, self.kv_cnt.shape)
        theirs = (other.q_block, other.kv_block, other.q_len, other.kv_len, other.kv_cnt.shape)
        return ours == theirs and torch.equal(self.block_mask(), other.block_mask())

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        batch, heads = self.kv_cnt.shape[:2]
        return (
            f"BlockLayout({self.q_len} x {self.kv_len} tokens, {self.nq} x {self.nk} blocks of "
            f"{self.q_block} x {self.kv_block}, batch {batch}, heads {heads}, density {self.density:.3f})"
        )


def _rank(scores: torch.Tensor, forced: torch.Tensor | None) -> torch.Tensor:
    """Position of every block in its row's order: forced blocks first, then by score, ties by index."""
    if forced is not None:
        scores = scores.masked_fill(forced, float("inf"))
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices
    places = torch.arange(scores.shape[-1], device=scores.device).expand_as(order)
    return torch.empty_like(order).scatter(-1, order, places)


def _check_blocks(name: str, x: torch.Tensor, q_len: int, kv_len: int, q_block: int, kv_block: int) -> None:
    expected = (ceil_div(q_len, q_block), ceil_div(kv_len, kv_block))
    if x.ndim != 4 or tuple(x.shape[-2:]) != expected:
        raise DitAttnError(
            f"{name} must be (B|1, H|1, {expected[0]}, {expected[1]}) for {q_len} x {kv_len} tokens in blocks of "
            f"{q_block} x {kv_block}, got {tuple(x.shape)}; pool with the same block sizes"
        )
