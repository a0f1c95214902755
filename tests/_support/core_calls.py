"""Attention calls of a host that is not diffusers: a run state filled in by hand, and what its calls must compute."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from dit_attn.processors.core.call import AttentionCall, CallMethod, Request, SDPAArgs
from dit_attn.processors.core.clock import Clock
from dit_attn.processors.core.dispatch import dispatch_attention
from dit_attn.processors.core.layer import Layer
from dit_attn.processors.core.run_state import RunState
from dit_attn.processors.core.tokens import Span, TokenLayout, visual_span

GRID = (4, 8, 9)
VISUAL, TEXT = 288, 20
JOINT = TokenLayout((Span("text", TEXT), visual_span("video", GRID)))


def host_run(
    methods: Sequence[CallMethod], layout: TokenLayout | None = JOINT, rows: int = 2, **options: Any
) -> tuple[RunState, Layer]:
    """A run of one layer at its first step, as a host without diffusers makes it."""
    run = RunState(methods, Clock(), **options)
    layer = run.add_layer("blocks.0")
    run.clock.tick(900.0, run.cfg)
    run.set_layout(layout)
    run.begin_call(rows)
    return run, layer


def random_args(
    seq_len: int = TEXT + VISUAL, heads: int = 4, key_heads: int = 2, keys: int | None = None, **more: Any
) -> SDPAArgs:
    """Random q, k, v (2, S, H, 16), with grouped keys."""
    draw = torch.Generator().manual_seed(0)
    q = torch.randn(2, seq_len, heads, 16, generator=draw)
    k, v = (torch.randn(2, keys or seq_len, key_heads, 16, generator=draw) for _ in range(2))
    return SDPAArgs(q, k, v, **more)


def stock_attention(args: SDPAArgs) -> torch.Tensor:
    """Dense attention by torch; (B, S, H, Dv)."""
    q, k, v = (x.transpose(1, 2) for x in (args.q, args.k, args.v))
    mask = args.mask[:, None, None] if args.mask is not None and args.mask.ndim == 2 else args.mask
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=args.causal, scale=args.scale, enable_gqa=True
    ).transpose(1, 2)


class Dispatched:
    """What came of a dispatched call: the result, whether stock attention ran, and the request that was carried out."""

    def __init__(self, run: RunState, layer: Layer, args: SDPAArgs) -> None:
        self.stock_calls = 0
        self.call: AttentionCall | None = None
        self.request = Request()
        run.observers.append(self._observe)
        try:
            self.out = dispatch_attention(run, layer, args, self._stock)
        finally:
            run.observers.remove(self._observe)

    def _stock(self, args: SDPAArgs) -> torch.Tensor:
        self.stock_calls += 1
        return stock_attention(args)

    def _observe(self, call: AttentionCall, request: Request, out: torch.Tensor) -> None:
        self.call, self.request = call, request
