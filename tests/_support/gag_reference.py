"""GAG by full attention matrices in float64."""

from __future__ import annotations

from typing import Any

import torch

from dit_attn import GAG
from dit_attn.processors.core.call import Request
from dit_attn.processors.guidance.sparse_text import entmax
from tests._support.recorded_calls import weights


def guided(call: Any, text: Any, method: GAG, bias: torch.Tensor | None = None) -> torch.Tensor:
    """(B, S, H, Dv): the guided result of every row, whose text are the keys ``text``; ``bias`` as for `weights`."""
    matrix, lse = weights(call, Request(), bias)
    v = call.v.transpose(1, 2).double().repeat_interleave(call.q.shape[2] // call.v.shape[2], 1)
    some, words = matrix[..., text], v[:, :, text]
    mass = some.sum(-1, keepdim=True)
    logits = some.log() + lse[..., None]
    dense, sparse = some / mass @ words, entmax(logits, method.alpha) @ words
    difference = sparse - dense
    along = (difference * sparse).sum(-1, keepdim=True) / sparse.square().sum(-1, keepdim=True) * sparse
    step = along + method.orthogonal * (difference - along)
    step = step * (method.limit / step.norm(dim=-1, keepdim=True)).clamp(max=1.0)
    stock = matrix @ v
    return (stock + method.strength * mass * (sparse + method.scale * step - dense)).transpose(1, 2)
