"""One checked attention call, as every backend takes it, and the constants of base-2 softmax."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from dit_attn.kernels.layouts.block_layout import BlockLayout

LOG2E = math.log2(math.e)
LN2 = math.log(2.0)
NEG_INF = float("-inf")


@dataclass(frozen=True)
class Problem:
    """One checked call.

    Attributes:
        q: (B, Sq, H, D).
        k: (B, Sk, Hk, D).
        v: (B, Sk, Hk, Dv).
        layout: on the device of q.
        scale: softmax scale.
        key_mask: (B, Sk) bool or ``None``.
        key_bias: (B|1, H|1, Sk) or ``None``, natural logarithm.
        low_rank: (B|1, H|1, Sq, R) and (B|1, H|1, Sk, R), whose product is added to the logits; only the forward pass
            of the gather backend takes it.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    layout: BlockLayout
    scale: float
    key_mask: torch.Tensor | None
    key_bias: torch.Tensor | None
    low_rank: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def ratio(self) -> int:
        """Query heads per key head, H / Hk."""
        return self.q.shape[2] // self.k.shape[2]

    @property
    def on_host(self) -> bool:
        """Whether the host can read counts without a synchronisation."""
        return self.q.device.type == "cpu"
