"""The definition of block-sparse attention in plain torch: builds the whole map, for tests and tiny inputs."""

from __future__ import annotations

import torch

from dit_attn.kernels.layout import BlockLayout


def reference_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: BlockLayout,
    *,
    scale: float | None = None,
    key_mask: torch.Tensor | None = None,
    key_bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax over the selected keys only, computed in fp64 for fp64 input and in fp32 otherwise.

    Args:
        q: (B, Sq, H, D).
        k, v: (B, Sk, Hk, D) and (B, Sk, Hk, Dv); ``H % Hk == 0``.
        layout: key blocks of every query block.
        scale: softmax scale, default ``D ** -0.5``.
        key_mask: (B, Sk) bool, keys that exist.
        key_bias: (B|1, H|1, Sk), added to the logits (natural logarithm).

    Returns:
        o (B, Sq, H, Dv) in q's dtype; lse (B, H, Sq), natural logarithm. A row without a key gives 0 and ``-inf``.
    """
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    groups = q.shape[2] // k.shape[2]
    qt, kt, vt = (x.transpose(1, 2).to(dtype) for x in (q, k, v))
    kt, vt = (x.repeat_interleave(groups, 1) if groups > 1 else x for x in (kt, vt))
    allowed = layout.materialize().to(q.device)
    if key_mask is not None:
        allowed = allowed & key_mask[:, None, None, :]
    logits = qt @ kt.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if key_bias is not None:
        logits = logits + key_bias[:, :, None, :].to(dtype)
    logits = logits.masked_fill(~allowed, float("-inf"))
    lse = torch.logsumexp(logits, -1)
    weights = torch.exp(logits - lse.masked_fill(lse == float("-inf"), 0.0)[..., None])
    # A key that no row reads may hold anything, NaN included: 0 * NaN must not reach the output.
    used = allowed.expand_as(logits).any(-2)[..., None]
    out = weights @ torch.where(used, vt, torch.zeros_like(vt))
    return out.transpose(1, 2).to(q.dtype), lse
