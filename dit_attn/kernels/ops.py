"""The operator every method calls, its checks, and the choice of the backend."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from dit_attn.errors import DitAttnError, unknown
from dit_attn.kernels.gather import gather_attention
from dit_attn.kernels.layout import BlockLayout
from dit_attn.kernels.reference import reference_attention

BACKENDS = ("gather", "reference", "sdpa")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class Choice:
    """The backend for a call.

    Attributes:
        backend: its name.
        reasons: why each of the other backends is not used, by name.
    """

    backend: str
    reasons: dict[str, str]


def sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: BlockLayout,
    *,
    scale: float | None = None,
    key_mask: torch.Tensor | None = None,
    key_bias: torch.Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention in which every query block reads only its key blocks.

    Args:
        q: (B, Sq, H, D); fp32, fp16, bf16 or fp64, any strides.
        k: (B, Sk, Hk, D); ``H % Hk == 0`` (query head h reads key head ``h // (H / Hk)``).
        v: (B, Sk, Hk, Dv).
        layout: key blocks of every query block; its batch and head sizes are 1 or B and H.
        scale: softmax scale, default ``D ** -0.5``.
        key_mask: (B, Sk) bool, keys that exist.
        key_bias: (B|1, H|1, Sk), added to the logits (natural logarithm).
        return_lse: also return the logarithm of the softmax denominator.
        backend: a name of ``BACKENDS`` forces it; ``None`` picks by capability (:func:`choose_backend` says why).

    Returns:
        o (B, Sq, H, Dv) in q's dtype, and with ``return_lse`` lse (B, H, Sq) fp32, natural logarithm. A row that reads
        no key gives 0 and ``-inf``.

    Raises:
        DitAttnError: an argument does not fit; the message names it and the remedy.
    """
    _check(q, k, v, layout, key_mask, key_bias)
    name = choose_backend(q, layout, return_lse=return_lse).backend if backend is None else backend
    if name not in BACKENDS:
        raise unknown("attention backend", name, BACKENDS)
    if name == "sdpa":
        return _dense(q, k, v, layout, scale, key_mask, key_bias, return_lse)
    run = gather_attention if name == "gather" else reference_attention
    extra = {"return_lse": return_lse} if name == "gather" else {}
    out, lse = run(q, k, v, layout, scale=scale, key_mask=key_mask, key_bias=key_bias, **extra)
    if not return_lse:
        return out
    assert lse is not None
    return out, lse


def choose_backend(q: torch.Tensor, layout: BlockLayout, *, return_lse: bool = False) -> Choice:
    """The backend :func:`sparse_attention` would use, and why not the others.

    Args:
        q: the queries (device, dtype and sizes are looked at).
        layout: the layout.
        return_lse: whether the log-sum is asked for.
    """
    reasons = {"reference": "builds the whole S x S map; only on request"}
    dense = layout.kv_idx.shape[-1] == layout.nk and layout.kv_cnt.device.type == "cpu" and layout.density >= 1.0
    if dense and not return_lse:
        return Choice("sdpa", {**reasons, "gather": "the layout is dense"})
    reasons["sdpa"] = "has no log-sum output" if dense else "the layout is sparse"
    return Choice("gather", reasons)


def _dense(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: BlockLayout,
    scale: float | None,
    key_mask: torch.Tensor | None,
    key_bias: torch.Tensor | None,
    return_lse: bool,
) -> torch.Tensor:
    if return_lse:
        raise DitAttnError("backend 'sdpa' has no log-sum output; use backend='gather' or leave it out")
    if layout.density < 1.0:
        raise DitAttnError(
            f"backend 'sdpa' needs a dense layout, got density {layout.density:.3f}; use backend='gather'"
        )
    mask = None
    if key_bias is not None:
        mask = key_bias[:, :, None, :].to(q.dtype)
    if key_mask is not None:
        keys = key_mask[:, None, None, :]
        mask = keys if mask is None else mask.masked_fill(~keys, float("-inf"))
    extra = {"enable_gqa": True} if q.shape[2] != k.shape[2] else {}
    out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask, scale=scale, **extra)
    return out.transpose(1, 2)


def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: BlockLayout,
    key_mask: torch.Tensor | None,
    key_bias: torch.Tensor | None,
) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise DitAttnError(
                f"{name} must be (B, S, H, D), got {x.ndim} dimensions {tuple(x.shape)}; unflatten the heads"
            )
        if x.dtype not in _DTYPES or x.dtype != q.dtype:
            raise DitAttnError(
                f"{name} has dtype {x.dtype}; q, k and v must share one of fp32, fp16, bf16, fp64: cast them"
            )
    if k.shape[:3] != v.shape[:3] or k.shape[0] != q.shape[0]:
        raise DitAttnError(
            f"k {tuple(k.shape)} and v {tuple(v.shape)} must agree in B, S and H, and with q in B {q.shape[0]}"
        )
    if q.shape[-1] != k.shape[-1]:
        raise DitAttnError(f"q and k must share the head size, got {q.shape[-1]} and {k.shape[-1]}")
    if q.shape[2] % k.shape[2]:
        raise DitAttnError(f"q has {q.shape[2]} heads, which is not a multiple of the {k.shape[2]} heads of k")
    if (layout.q_len, layout.kv_len) != (q.shape[1], k.shape[1]):
        raise DitAttnError(
            f"layout is for {layout.q_len} x {layout.kv_len} tokens, q and k have {q.shape[1]} x {k.shape[1]}; "
            "build the layout for this sequence"
        )
    for axis, size, name in ((0, q.shape[0], "batch"), (1, q.shape[2], "head")):
        if layout.kv_cnt.shape[axis] not in (1, size):
            raise DitAttnError(f"layout has {layout.kv_cnt.shape[axis]} {name} entries, must be 1 or {size}")
    if key_mask is not None and (key_mask.dtype != torch.bool or tuple(key_mask.shape) != (q.shape[0], k.shape[1])):
        raise DitAttnError(
            f"key_mask must be bool ({q.shape[0]}, {k.shape[1]}), got {key_mask.dtype} {tuple(key_mask.shape)}"
        )
    if key_bias is not None and (key_bias.ndim != 3 or key_bias.shape[-1] != k.shape[1]):
        raise DitAttnError(f"key_bias must be (B|1, H|1, {k.shape[1]}), got {tuple(key_bias.shape)}")
