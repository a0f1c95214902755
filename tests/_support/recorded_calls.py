"""Attention calls of a model as the tests see them: at every tap, and with the request and result of a method."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from dit_attn.processors.attach import attention_processor, intercepted_call
from dit_attn.processors.core import call, dispatch, executor
from dit_attn.processors.core.tokens import Tokens


@dataclass
class Seen:
    """One attention call as the tap saw it; tensors are (B, S, H, D)."""

    layer: str
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: torch.Tensor | None
    scale: float | None
    tokens: Tokens | None
    step: int
    branches: tuple[str, ...]
    out: torch.Tensor


@contextmanager
def watching() -> Iterator[list[Seen]]:
    """Record every call that reaches a tap."""
    seen: list[Seen] = []
    stock = attention_processor.dispatch_attention

    def record(run: Any, layer: Any, args: Any, stock_call: Any) -> torch.Tensor:
        out = stock(run, layer, args, stock_call)
        if dispatch.is_among_keys(run, layer, args):
            return out
        tokens = run.tokens((args.k if layer.kind == "self" else args.q).shape[1], layer)
        branches = run.branches(args.q.shape[0], layer.rows[0])
        given = (args.q, args.k, args.v, args.mask, args.scale)
        seen.append(Seen(layer.name, *given, tokens, run.clock.step, branches, out))
        return out

    attention_processor.dispatch_attention = intercepted_call.dispatch_attention = record
    try:
        yield seen
    finally:
        attention_processor.dispatch_attention = intercepted_call.dispatch_attention = stock


@contextmanager
def requests() -> Iterator[list[tuple[call.AttentionCall, call.Request, torch.Tensor]]]:
    """Record every engaged call with its request and result."""
    seen: list[tuple[call.AttentionCall, call.Request, torch.Tensor]] = []
    stock = executor.run

    def record(call: call.AttentionCall, request: call.Request, dense: Any) -> torch.Tensor:
        out = stock(call, request, dense)
        seen.append((call, request, out))
        return out

    dispatch.executor.run = record
    try:
        yield seen
    finally:
        dispatch.executor.run = stock


def reference(call: Any, request: call.Request, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Attention in float64 by its weights; arguments as for :func:`weights`. (B, S, H, Dv)."""
    v = call.v.transpose(1, 2).double().repeat_interleave(call.q.shape[2] // call.v.shape[2], 1)
    return (weights(call, request, bias)[0] @ v).transpose(1, 2)


def weights(call: Any, request: call.Request, bias: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """A masked softmax in float64 over the whole map: visual rows by the layout, other rows as the model asked.

    Args:
        call, request: the call and its request; without a layout all rows are dense.
        bias: (B|1, H|1, S, Sk), added to the logits.

    Returns:
        The attention matrix (B, H, S, Sk), rows without a key 0, and the log-sum-exp (B, H, S).
    """
    q, k = (x.transpose(1, 2).double() for x in (call.q, call.k))
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scale = call.scale if call.scale is not None else q.shape[-1] ** -0.5
    logits = q @ k.transpose(-1, -2) * scale
    allowed = torch.ones_like(logits, dtype=torch.bool)
    if request.layout is not None:
        assert call.tokens is not None and call.tokens.visual_range is not None
        allowed[:, :, slice(*call.tokens.visual_range)] = request.layout.materialize()
    if bias is not None:
        logits = logits + bias.double()
    if call.mask is not None:
        mask = call.mask[:, None, None, :] if call.mask.ndim == 2 else call.mask
        if mask.dtype == torch.bool:
            allowed = allowed & mask
        else:
            logits = logits + mask.double()
    logits = logits.masked_fill(~allowed, float("-inf"))
    return torch.softmax(logits, -1).nan_to_num(0.0), torch.logsumexp(logits, -1)
