"""One checked call of linear attention, as every implementation takes it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dit_attn.kernels.layouts.block_layout import ceil_div


@dataclass(frozen=True)
class LinearCall:
    """One checked call.

    Attributes:
        q: (B, Sq, H, D).
        k: (B, Sk, Hk, D).
        v: (B, Sk, Hk, Dv).
        blocks: (B|1, H|1, nq, nk) bool, key blocks that each query block attends to; ``None`` for all.
        key_weight: (B|1, H|1, Sk) fp32 of at least 0, a factor of the key's features; ``None`` for 1. It is that of the
            key heads: one head, or Hk where H is Hk.
        feature_map: of :data:`~dit_attn.kernels.linear.feature_maps.FEATURE_MAPS`.
        q_block, kv_block: tokens per block.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    blocks: torch.Tensor | None
    key_weight: torch.Tensor | None
    feature_map: str
    q_block: int
    kv_block: int

    @property
    def ratio(self) -> int:
        """Query heads per key head, H / Hk."""
        return self.q.shape[2] // self.k.shape[2]

    @property
    def nq(self) -> int:
        """Number of query blocks."""
        return ceil_div(self.q.shape[1], self.q_block)

    @property
    def nk(self) -> int:
        """Number of key blocks."""
        return ceil_div(self.k.shape[1], self.kv_block)
