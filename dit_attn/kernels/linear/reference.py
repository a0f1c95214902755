"""Linear attention over key blocks by its definition, with the full attention matrix: for tests."""

from __future__ import annotations

import torch

from dit_attn.kernels.linear.call import LinearCall
from dit_attn.kernels.linear.feature_maps import feature_map


def reference_linear_attention(call: LinearCall) -> torch.Tensor:
    """Compute o (B, Sq, H, Dv) in q's dtype, in fp32 (fp64 for fp64 input); differentiable by autograd."""
    dtype = torch.float64 if call.q.dtype == torch.float64 else torch.float32
    q, k, v = (x.transpose(1, 2).to(dtype) for x in (call.q, call.k, call.v))
    k, v = (x.repeat_interleave(call.ratio, 1) for x in (k, v))
    weights = feature_map(q, call.feature_map) @ feature_map(k, call.feature_map).mT
    if call.key_weight is not None:
        weights = weights * call.key_weight.to(dtype)[:, :, None]
    if call.blocks is not None:
        allowed = call.blocks.repeat_interleave(call.q_block, -2).repeat_interleave(call.kv_block, -1)
        weights = weights.masked_fill(~allowed[..., : q.shape[2], : k.shape[2]], 0.0)
    total = weights.sum(-1, keepdim=True)
    out = (weights @ v) / total.masked_fill(total == 0.0, 1.0)
    return out.transpose(1, 2).to(call.q.dtype)
