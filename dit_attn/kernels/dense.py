"""Dense attention that also returns the log-sum-exp of every row, or takes a low-rank bias."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from dit_attn.kernels.functional import sparse_attention
from dit_attn.kernels.layouts.block_layout import BlockLayout, ceil_div
from dit_attn.kernels.terms import BARRED, LogitBias

WIDEST = 256  # channels of torch's fused kernels on an accelerator
UNFUSED_ROWS = 256  # at a time where they do not run
PARTS = 3  # numbers of 8 or 11 bits in one of 24


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


def _additive(q: torch.Tensor, key_mask: torch.Tensor | None, key_bias: torch.Tensor | None) -> torch.Tensor | None:
    """(B|1, H|1, 1, Sk) of q's dtype, or ``None``."""
    if key_bias is not None:
        return key_bias[:, :, None].to(q.dtype)
    if key_mask is None:
        return None
    return torch.zeros_like(key_mask, dtype=q.dtype).masked_fill_(~key_mask, float("-inf"))[:, None, None]


def biased_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: LogitBias,
    *,
    scale: float | None = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute dense attention with a low-rank bias of the logits by torch's fused kernel. Differentiable.

    The columns of the bias are channels of the queries and keys, so that memory is linear in the sequence. In fp16 and
    bf16 each is a sum of several, exact to fp32. One more key of value 0, below every logit that counts and above every
    barred one, leaves a row that is barred from all keys at 0.

    Args:
        q: (B, Sq, H, D).
        k: (B, Sk, Hk, D); ``H % Hk == 0``.
        v: (B, Sk, Hk, Dv).
        bias: its factors; a bias of at most :data:`~dit_attn.kernels.terms.BARRED` is ``-inf``.
        scale: softmax scale, default ``D ** -0.5``.
        mask: broadcastable to (B, H, Sq, Sk); boolean (True = attend) or additive.

    Returns:
        (B, Sq, H, Dv) in q's dtype.
    """
    if torch.is_autocast_enabled(q.device.type):
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if scale == 0.0:
        q, scale = q * 0.0, 1.0
    heads, value_dim = q.shape[2], v.shape[-1]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if bias.k.shape[1] > 1 and k.shape[1] < heads:
        k, v = (x.repeat_interleave(heads // k.shape[1], 1) for x in (k, v))
    limit = torch.finfo(q.dtype).max / 2 if q.dtype == torch.float16 else float("inf")
    rows, keys = _channels((bias.q / scale).clamp(-limit, limit), bias.k, q.dtype)
    lowest = max(BARRED / scale, -limit / 2)
    rows = _beside(q, rows, q.new_ones(1, 1, q.shape[2], 1))
    keys = F.pad(_beside(k, keys, k.new_zeros(1, 1, k.shape[2], 1)), (0, 0, 0, 1))
    keys[:, :, -1, -1] = lowest
    width = 8 * ceil_div(max(rows.shape[-1], value_dim), 8)  # head sizes that fused kernels take
    rows, keys = (F.pad(x, (0, width - x.shape[-1])) for x in (rows, keys))
    values = F.pad(v, (0, width - value_dim, 0, 1))
    if mask is not None:
        mask = F.pad(mask.expand(*mask.shape[:-1], k.shape[2]), (0, 1), value=mask.dtype == torch.bool)
    gqa = {"enable_gqa": True} if keys.shape[1] != heads else {}
    fused = q.device.type == "cpu" or width <= WIDEST
    chunks, count = [], q.shape[2]
    for first in range(0, count, count if fused else UNFUSED_ROWS):
        some = slice(first, None if fused else first + UNFUSED_ROWS)
        part = mask if mask is None or mask.shape[-2] == 1 else mask[..., some, :]
        q = rows[:, :, some]
        chunks.append(F.scaled_dot_product_attention(q, keys, values, attn_mask=part, scale=scale, **gqa))
    return torch.cat(chunks, 2)[..., :value_dim].transpose(1, 2)


def _channels(rows: torch.Tensor, keys: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Channels of ``dtype`` whose products add up to those of the factors, to the precision of fp32."""
    if dtype.itemsize > 2:
        return rows.to(dtype), keys.to(dtype)
    parts = [list(_parts(x.float(), dtype)) for x in (rows, keys)]
    pairs = [(i, j) for i in range(PARTS) for j in range(PARTS - i)]
    return torch.cat([parts[0][i] for i, _ in pairs], -1), torch.cat([parts[1][j] for _, j in pairs], -1)


def _parts(x: torch.Tensor, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """Tensors of ``dtype`` that add up to ``x``, each the rounding of what the earlier ones leave."""
    for _ in range(PARTS):
        part = x.to(dtype)
        x = x - part
        yield part


def _beside(x: torch.Tensor, *channels: torch.Tensor) -> torch.Tensor:
    """(B, H, S, D + ...): further channels (B|1, H|1, S, ...) of x."""
    return torch.cat([x, *(more.to(x.dtype).expand(*x.shape[:3], -1) for more in channels)], -1)
