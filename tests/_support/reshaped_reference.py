"""The equations of Re-ttention in float64 over the whole map."""

from __future__ import annotations

import torch

from dit_attn.kernels.layouts.block_layout import BlockLayout
from dit_attn.kernels.layouts.token_order import token_order
from dit_attn.processors.core.call import AttentionCall
from tests._support.rectified_reference import NONE


def read_pairs(call: AttentionCall, layout: BlockLayout, order: str) -> torch.Tensor:
    """(B|1, H|1, Sv, S) bool, which keys of the sequence each visual row reads, both in the sequence's own order."""
    tokens = call.tokens
    assert tokens is not None and tokens.visual_range is not None
    start, stop = tokens.visual_range
    picture = torch.cat([token_order(order, span.grid).order + span.start for span in tokens.visual if span.grid])
    rest = torch.tensor([i for i in range(tokens.seq_len) if not start <= i < stop], dtype=torch.long)
    pairs = layout.materialize()
    out = torch.zeros_like(pairs)
    out[:, :, (picture - start)[:, None], torch.cat([picture, rest])[None]] = pairs
    return out


def kept_and_dense(call: AttentionCall, pairs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """W, rho (..., 1) and F of the visual rows, (B, H, Sv, D) float64."""
    assert call.tokens is not None and call.tokens.visual_range is not None
    start, stop = call.tokens.visual_range
    q, k, v = (x.transpose(1, 2).double() for x in (call.q[:, start:stop], call.k, call.v))
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    logits = q @ k.transpose(-1, -2) * (call.scale if call.scale is not None else q.shape[-1] ** -0.5)
    if call.mask is not None:
        mask = call.mask[:, None, None, :] if call.mask.ndim == 2 else call.mask
        mask = mask if mask.shape[2] == 1 else mask[:, :, start : start + 1]
        logits = logits.masked_fill(~mask, NONE) if mask.dtype == torch.bool else logits + mask.double()
    kept = logits.masked_fill(~pairs, NONE)
    held = torch.exp(kept.logsumexp(-1, keepdim=True) - logits.logsumexp(-1, keepdim=True))
    return torch.softmax(kept, -1).nan_to_num(0.0) @ v, held, torch.softmax(logits, -1) @ v


def reshaped(
    refresh: AttentionCall, now: AttentionCall, pairs: torch.Tensor, growth: float = 0.0, conserving: bool = False
) -> torch.Tensor:
    """(B, Sv, H, D): the answer to ``now`` from a refresh, ``(rho + growth) W + R``."""
    before, held, dense = kept_and_dense(refresh, pairs)
    rest = dense - held * before
    grown = (held + growth).clamp(max=1.0)
    if conserving:
        rest = rest * (1.0 - grown) / (1.0 - held)
    return (grown * kept_and_dense(now, pairs)[0] + rest).transpose(1, 2)
