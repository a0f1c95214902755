"""Attention with every optional term by its formula, in fp64 with the full attention matrix."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from dit_attn.kernels.problem import Problem
from dit_attn.kernels.terms import BARRED, NO_TERMS, Terms


def wide(x: Any) -> Any:
    """Tensors in fp64, through dataclasses; everything else as it is."""
    if isinstance(x, torch.Tensor):
        return x.double() if x.is_floating_point() else x
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        return dataclasses.replace(x, **{f.name: wide(getattr(x, f.name)) for f in dataclasses.fields(x)})
    return x


def definition(problem: Problem, terms: Terms = NO_TERMS) -> tuple[torch.Tensor, torch.Tensor]:
    """(o, lse) in fp64."""
    layout, ratio = problem.layout, problem.ratio
    terms = Terms(*(wide(getattr(terms, f.name)) for f in dataclasses.fields(terms)))
    q, k, v = (wide(x).transpose(1, 2) for x in (problem.q, problem.k, problem.v))
    k, v = k.repeat_interleave(ratio, 1), v.repeat_interleave(ratio, 1)
    own_v = v
    x = problem.scale * q @ k.mT
    if problem.key_bias is not None:
        x = x + wide(problem.key_bias)[:, :, None]
    attended = layout.materialize().expand(x.shape)
    if terms.bias is not None:
        low_rank = terms.bias.q @ terms.bias.k.mT
        x, attended = x + low_rank, attended & (low_rank > BARRED)
    if problem.key_mask is not None:
        attended = attended & problem.key_mask[:, None, None]
    if terms.key_lengths is not None:
        attended = attended & (torch.arange(k.shape[2]) < terms.key_lengths[:, None])[:, None, None]
    x = x.masked_fill(~attended, float("-inf"))
    comp = terms.compensation
    if comp is not None:
        ck, cv = comp.k.repeat_interleave(ratio, 1), comp.v.repeat_interleave(ratio, 1)
        y = problem.scale * q @ ck.mT + comp.log_weight[:, :, None]
        if comp.variance is not None:
            spread = q.square() @ comp.variance.repeat_interleave(ratio, 1).mT
            y = y + (0.5 * problem.scale**2 * spread).clamp(max=comp.cap)
        block_of = torch.arange(ck.shape[2]) * comp.tokens // layout.kv_block
        without = layout.block_mask() if comp.left_out is None else layout.block_mask() | comp.left_out
        chosen = without[..., block_of]
        chosen = chosen[:, :, torch.arange(q.shape[2]) // layout.q_block]
        if comp.bias is not None:
            assert terms.bias is not None
            low_rank = terms.bias.q @ comp.bias.mT
            y, chosen = y + low_rank, chosen | (low_rank <= BARRED)
        x = torch.cat([x, y.masked_fill(chosen, float("-inf"))], -1)
        v = torch.cat([v, cv], 2)
    lse = torch.logsumexp(x, -1)
    weight = torch.exp(x - lse.masked_fill(lse.isinf(), 0.0)[..., None])
    out = torch.where(weight[..., None] > 0, weight[..., None] * v[:, :, None], 0.0).sum(3)
    if comp is not None and comp.first_order is not None:
        slope = problem.scale * q @ comp.first_order.repeat_interleave(ratio, 1)
        out = out + weight[..., k.shape[2] :].sum(-1, keepdim=True) * slope
    end = terms.epilogue
    if end is not None:
        block = torch.arange(q.shape[2]) // layout.q_block
        if end.row_scale is not None:
            out = out * end.row_scale[:, :, block, None]
        if end.lse_ref is not None:
            out = out * torch.exp((lse - end.lse_ref).clamp(max=end.cap))[..., None]
        if end.add is not None:
            out = out + end.add[:, :, block]
        if end.blend is not None:
            tau = end.blend[:, :, None, None]
            own = own_v[:, :, end.value_shift : end.value_shift + q.shape[2]]
            out = (1 - tau) * out + tau * own
            lse = lse.masked_fill((tau == 1).squeeze(-1), float("-inf"))
    return out.transpose(1, 2), lse
