"""A processor that calls torch's attention, and wrapped processors whose session is a run of one layer."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from dit_attn.processors.attach.attention_processor import wrap_processor
from dit_attn.processors.core.layer import Layer
from tests._support.core_calls import host_run

BLOCKS: dict[str, Any] = {"q_block": 32, "kv_block": 32, "dense_steps": 0}


class TorchProcessor:
    """Calls torch's attention directly; its rows depend on one setting of its own."""

    def __init__(self, scale: float = 0.3) -> None:
        self.scale = scale

    def __call__(
        self, attn: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attention_mask: Any = None, rope: Any = None
    ) -> torch.Tensor:
        """(B, S, H, D) in and out."""
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask, scale=self.scale, enable_gqa=True)
        return out.transpose(1, 2)


def session_like(methods: Any) -> tuple[Any, Layer]:
    """A run of one layer that answers what processors ask of a session."""
    run: Any
    run, layer = host_run(methods)
    run.detached, run.recomputing, run.resampled, run.module = False, False, False, lambda layer: None
    run.check_thread = lambda: None
    return run, layer


def wrapped(stock: Any, methods: Any = ()) -> tuple[Any, Any, Layer]:
    """A wrapped processor with its run and layer; it is called with ``None`` as its attention module."""
    run, layer = session_like(methods)
    return wrap_processor(stock, run, layer), run, layer  # type: ignore[arg-type]
