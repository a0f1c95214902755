"""Every check of an attention call, once, at the edge: one line that names the argument and the fix."""

from __future__ import annotations

import torch

from dit_attn.errors import DitAttnError
from dit_attn.kernels.layout import BlockLayout
from dit_attn.kernels.terms import Terms, check_terms

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_call(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: BlockLayout,
    key_mask: torch.Tensor | None,
    key_bias: torch.Tensor | None,
    terms: Terms,
) -> None:
    """Raise for the first argument of :func:`dit_attn.kernels.sparse_attention` that does not fit.

    Raises:
        DitAttnError: rank, type, device, head count, head size, layout, mask or an optional term does not fit.
    """
    _check_tensors(q, k, v)
    _check_heads(q, k, v)
    _check_layout(q, k, layout)
    _check_keys(q, k, key_mask, key_bias)
    if terms:
        check_terms(q, k, v, layout, terms)


def _check_tensors(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise DitAttnError(
                f"{name} must be (B, S, H, D), got {x.ndim} dimensions {tuple(x.shape)}; split the heads with unflatten"
            )
        if x.dtype not in DTYPES:
            raise DitAttnError(f"{name} has dtype {_name(x.dtype)}; cast it to one of {', '.join(map(_name, DTYPES))}")
        if x.dtype != q.dtype or x.device != q.device:
            raise DitAttnError(
                f"{name} is {_name(x.dtype)} on {x.device} and q is {_name(q.dtype)} on {q.device}; "
                "q, k and v must share both: move or cast one"
            )


def _check_heads(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    if k.shape[:3] != v.shape[:3]:
        raise DitAttnError(f"k {tuple(k.shape)} and v {tuple(v.shape)} must agree in (B, S, H); pass matching tensors")
    if k.shape[0] != q.shape[0]:
        raise DitAttnError(f"q has batch {q.shape[0]} and k has batch {k.shape[0]}; expand k and v to q's batch")
    if q.shape[-1] != k.shape[-1]:
        raise DitAttnError(f"q and k must share the head size D, got {q.shape[-1]} and {k.shape[-1]}")
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise DitAttnError(
            f"q has {q.shape[2]} heads, which is not a multiple of the {k.shape[2]} heads of k; repeat the heads of k "
            "and v, or check that the tensors are (B, S, H, D) and not (B, H, S, D)"
        )


def _check_layout(q: torch.Tensor, k: torch.Tensor, layout: BlockLayout) -> None:
    if (layout.q_len, layout.kv_len) != (q.shape[1], k.shape[1]):
        raise DitAttnError(
            f"layout is for {layout.q_len} x {layout.kv_len} tokens, q and k have {q.shape[1]} x {k.shape[1]}; "
            "build the layout for this sequence"
        )
    for axis, size, name in ((0, q.shape[0], "batch"), (1, q.shape[2], "head")):
        if layout.kv_cnt.shape[axis] not in (1, size):
            raise DitAttnError(
                f"layout has {layout.kv_cnt.shape[axis]} {name} entries, q has {size}; build it with 1 or {size}"
            )
    if layout.kv_idx.device != q.device:
        raise DitAttnError(f"layout is on {layout.kv_idx.device} and q on {q.device}; use layout.to(q.device)")


def _check_keys(
    q: torch.Tensor, k: torch.Tensor, key_mask: torch.Tensor | None, key_bias: torch.Tensor | None
) -> None:
    batch, heads, keys = q.shape[0], q.shape[2], k.shape[1]
    if key_mask is not None and (key_mask.dtype != torch.bool or tuple(key_mask.shape) != (batch, keys)):
        raise DitAttnError(
            f"key_mask must be bool (B, Sk) = ({batch}, {keys}), got {_name(key_mask.dtype)} {tuple(key_mask.shape)}; "
            "True keeps a key"
        )
    if key_bias is not None and (
        key_bias.ndim != 3
        or key_bias.shape[0] not in (1, batch)
        or key_bias.shape[1] not in (1, heads)
        or key_bias.shape[2] != keys
        or not key_bias.is_floating_point()
    ):
        raise DitAttnError(
            f"key_bias must be float (B|1, H|1, Sk) with B={batch}, H={heads}, Sk={keys}, "
            f"got {_name(key_bias.dtype)} {tuple(key_bias.shape)}"
        )
    for name, x in (("key_mask", key_mask), ("key_bias", key_bias)):
        if x is not None and x.device != q.device:
            raise DitAttnError(f"{name} is on {x.device} and q on {q.device}; move it")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
