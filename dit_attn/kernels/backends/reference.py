"""Block-sparse attention by its definition, in plain torch with the full attention matrix: for tests."""

from __future__ import annotations

import torch

from dit_attn.kernels.layouts.block_layout import BlockLayout


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
    """Compute block-sparse attention with the full attention matrix, in fp32 (fp64 for fp64 input).

    Args:
        q: (B, Sq, H, D).
        k, v: (B, Sk, Hk, D) and (B, Sk, Hk, Dv); ``H % Hk == 0``.
        layout: key blocks of every query block.
        scale: softmax scale, default ``D ** -0.5``.
        key_mask: (B, Sk) bool, keys that exist.
        key_bias: (B|1, H|1, Sk), added to the logits (natural logarithm).

    Returns:
        o (B, Sq, H, Dv) in q's dtype; lse (B, H, Sq) fp32 (fp64 for fp64), natural logarithm. A row without a key
        gives 0 and ``-inf``.
    """
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    ratio = q.shape[2] // k.shape[2]
    qt, kt, vt = (x.transpose(1, 2).to(dtype) for x in (q, k, v))
    kt, vt = (x.repeat_interleave(ratio, 1) if ratio > 1 else x for x in (kt, vt))
    allowed = layout.materialize().to(q.device)
    if key_mask is not None:
        allowed = allowed & key_mask[:, None, None, :]
    allowed = allowed.expand(q.shape[0], q.shape[2], -1, -1)
    bias = None if key_bias is None else key_bias[:, :, None, :].to(dtype)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    blocks = zip(qt.split(layout.q_block, 2), allowed.split(layout.q_block, 2))
    parts = [_rows(rows, kt, vt, mask, factor, bias) for rows, mask in blocks]
    return torch.cat([o for o, _ in parts], 2).transpose(1, 2).to(q.dtype), torch.cat([lse for _, lse in parts], 2)


def _rows(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, allowed: torch.Tensor, scale: float, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """o (B, H, rows, Dv) and lse (B, H, rows) of one query block."""
    # A key that none of these rows attends to may be NaN: 0 * NaN must reach neither output nor gradient.
    unattended = ~allowed.any(-2)[..., None]
    k, v = k.masked_fill(unattended, 0.0), v.masked_fill(unattended, 0.0)
    logits = q @ k.transpose(-1, -2) * scale
    if bias is not None:
        logits = logits + bias
    logits = logits.masked_fill(~allowed, float("-inf"))
    empty = (logits == float("-inf")).all(-1, keepdim=True)
    logits = logits.masked_fill(empty, 0.0)
    lse = torch.logsumexp(logits, -1).masked_fill(empty[..., 0], float("-inf"))
    weights = torch.softmax(logits, -1).masked_fill(empty, 0.0)
    return weights @ v, lse
