"""Dense attention that also returns the log-sum-exp of every row."""

from __future__ import annotations

import torch

from dit_attn.kernels.functional import sparse_attention
from dit_attn.kernels.layouts.block_layout import BlockLayout


@torch.no_grad()
def dense_with_lse(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float | None = None,
    key_mask: torch.Tensor | None = None,
    key_bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute dense attention and its log-sum-exp (LSE). Not differentiable.

    On a CPU the output is bit-equal to torch's fused attention; elsewhere the block-sparse kernel runs over all blocks.

    Args:
        q: (B, Sq, H, D).
        k, v: (B, Sk, Hk, D); ``H % Hk == 0``.
        scale: softmax scale, default ``D ** -0.5``.
        key_mask: (B, Sk) bool, keys that exist.
        key_bias: (B|1, H|1, Sk), added to the logits, natural logarithm; ``key_mask`` is ignored then.

    Returns:
        o (B, Sq, H, D) in q's dtype, lse (B, H, Sq) fp32 (fp64 for fp64 input), natural logarithm.
    """
    if q.device.type == "cpu" and q.shape[-1] == v.shape[-1]:
        return _fused_cpu(q, k, v, scale, _additive(q, key_mask, key_bias))
    layout = BlockLayout.dense(q.shape[1], k.shape[1], device=q.device)
    out = sparse_attention(
        q, k, v, layout, scale=scale, key_mask=key_mask if key_bias is None else None, key_bias=key_bias,
        return_lse=True,
    )  # fmt: skip
    assert isinstance(out, tuple)
    return out


def _fused_cpu(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    group = q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if group > 1:
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=mask, scale=scale)
    return out.transpose(1, 2), lse


def _additive(
    q: torch.Tensor, key_mask: torch.Tensor | None, key_bias: torch.Tensor | None
) -> torch.Tensor | None:
    """(B|1, H|1, 1, Sk) of q's dtype, or ``None``."""
    if key_bias is not None:
        return key_bias[:, :, None].to(q.dtype)
    if key_mask is None:
        return None
    return torch.zeros_like(key_mask, dtype=q.dtype).masked_fill_(~key_mask, float("-inf"))[:, None, None]
