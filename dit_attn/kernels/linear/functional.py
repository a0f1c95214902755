"""The public operator of linear attention, and the custom operators behind it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dit_attn.errors import DitAttnError, unknown
from dit_attn.kernels.checks import check_blocks, check_heads, check_sizes, check_tokens
from dit_attn.kernels.device import full_precision, unsupported_reason_triton
from dit_attn.kernels.linear.call import LinearCall
from dit_attn.kernels.linear.feature_maps import FEATURE_MAPS
from dit_attn.kernels.linear.products import linear_backward, linear_forward
from dit_attn.kernels.linear.reference import reference_linear_attention

BACKENDS = ("triton", "torch", "reference")


def linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    blocks: torch.Tensor | None = None,
    *,
    q_block: int = 128,
    kv_block: int = 128,
    feature_map: str = "softmax",
    key_weight: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Compute linear attention in which every query block attends only to its key blocks.

    The weight of key n for query m is ``phi(q_m) . phi(k_n)``, divided by the sum of the row: the linear branch of SLA
    (arXiv 2509.24006). Differentiable in q, k and v; gradients are the same in every run. Memory beyond the arguments
    is (blocks, D, Dv) sums, on a CPU those of a few heads.

    Args:
        q: (B, Sq, H, D); fp32, fp16, bf16 or fp64.
        k: (B, Sk, Hk, D); ``H % Hk == 0``.
        v: (B, Sk, Hk, Dv).
        blocks: (B|1, H|1, nq, nk) bool, key blocks of every query block; ``None`` for all keys.
        q_block, kv_block: tokens per block.
        feature_map: phi: ``softmax`` over the channels, ``elu`` + 1, or ``relu``.
        key_weight: (B|1, 1, Sk) or, where H is Hk, (B|1, H, Sk): a factor of at least 0 for the weight of every key;
            0 for keys that do not exist. No gradient.
        backend: ``triton`` (on a GPU by default), ``torch``, or ``reference`` with the full attention matrix.

    Returns:
        (B, Sq, H, Dv) in q's dtype; 0 in a row whose weights are all 0.

    Raises:
        DitAttnError: an argument does not fit, or the forced backend cannot run the call.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_tokens(name, x)
        if x.device != q.device:
            raise DitAttnError(f"{name} is on {x.device} and q on {q.device}; move it")
    check_heads(q, k)
    check_sizes(q_block=q_block, kv_block=kv_block, Sq=q.shape[1], Sk=k.shape[1])
    if v.shape[:3] != k.shape[:3]:
        raise DitAttnError(f"v must be (B, Sk, Hk, Dv) = {(*k.shape[:3], 'Dv')}, got {tuple(v.shape)}")
    if feature_map not in FEATURE_MAPS:
        raise unknown("feature_map", feature_map, FEATURE_MAPS)
    if blocks is not None:
        check_blocks("blocks", blocks, q.shape[1], k.shape[1], q_block, kv_block, torch.bool)
        if blocks.shape[0] not in (1, q.shape[0]) or blocks.shape[1] not in (1, q.shape[2]):
            raise DitAttnError(
                f"blocks are for batch and heads {tuple(blocks.shape[:2])}; q has {q.shape[0]} and {q.shape[2]}"
            )
    if key_weight is not None:
        _check_weight(key_weight, q, k)
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = (x.to(dtype) if x.dtype != torch.float64 else x for x in (q, k, v))
    call = LinearCall(q, k, v, blocks, key_weight, feature_map, q_block, kv_block)
    name = _resolve(backend, call)
    with full_precision(q.device):
        if name == "reference":
            return reference_linear_attention(call)
        return linear_attention_op(q, k, v, blocks, key_weight, feature_map, q_block, kv_block, name)


def _check_weight(weight: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> None:
    heads = (1, k.shape[2]) if q.shape[2] == k.shape[2] else (1,)
    if weight.ndim != 3 or weight.shape[0] not in (1, k.shape[0]) or weight.shape[1] not in heads:
        raise DitAttnError(
            f"key_weight must be (B|1, 1, Sk), or (B|1, H, Sk) without grouped heads, got {tuple(weight.shape)}"
        )
    if weight.shape[2] != k.shape[1]:
        raise DitAttnError(f"key_weight is for {weight.shape[2]} keys, k has {k.shape[1]}")


def _resolve(backend: str | None, call: LinearCall) -> str:
    """Name of the backend of a call."""
    if backend is not None and backend not in BACKENDS:
        raise unknown("backend of linear attention", backend, BACKENDS)
    reason = unsupported_reason(call)
    if backend is None:
        return "torch" if reason or call.q.device.type == "cpu" else "triton"
    if backend == "triton" and reason:
        raise DitAttnError(f"backend 'triton' cannot run this call: {reason}; use backend='torch' or leave it out")
    return backend


def unsupported_reason(call: LinearCall) -> str | None:
    """Return why the Triton kernels cannot run a call, or ``None``."""
    if reason := unsupported_reason_triton(call.q.device):
        return reason
    if call.q.dtype == torch.float64:
        return "Triton kernels compute in fp32 at most"
    for size in (call.q.shape[-1], call.v.shape[-1]):
        if not 16 <= size <= 128:
            return f"head size {size} is not within 16 to 128"
    for name, block in (("q_block", call.q_block), ("kv_block", call.kv_block)):
        if block % 16:
            return f"{name} {block} is not a multiple of 16"
    return None


# -- custom operators --------------------------------------------------------------------------------------------------

_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? blocks, Tensor? key_weight, str feature_map, int q_block, int kv_block, "
    "str backend"
)


def _forward(*args: Any) -> torch.Tensor:
    *given, backend = args
    call = LinearCall(*given)
    if backend == "torch":
        return linear_forward(call)
    from dit_attn.kernels.linear.triton_launches import triton_linear_forward

    return triton_linear_forward(call)


def _backward(grad: torch.Tensor, out: torch.Tensor, *args: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    *given, backend = args
    call = LinearCall(*given)
    run: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = linear_backward
    if backend == "triton":
        from dit_attn.kernels.linear.triton_launches import triton_linear_backward as run
    with full_precision(out.device):
        return run(call, out, grad)


linear_attention_op = torch.library.custom_op(
    "dit_attn::linear_attention", _forward, mutates_args=(), schema=f"({_ARGUMENTS}) -> Tensor"
)
_backward_op = torch.library.custom_op(
    "dit_attn::linear_attention_backward",
    _backward,
    mutates_args=(),
    schema=f"(Tensor grad, Tensor out, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
)


@linear_attention_op.register_fake
def _(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> torch.Tensor:
    return q.new_empty(q.shape[0], q.shape[1], q.shape[2], v.shape[3])


@_backward_op.register_fake
def _(grad: torch.Tensor, out: torch.Tensor, q: Any, k: Any, v: Any, *rest: Any) -> tuple[torch.Tensor, ...]:
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(output, *inputs[:5])
    ctx.settings = inputs[5:]


def _differentiate(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    out, *tensors = ctx.saved_tensors
    grads = torch.ops.dit_attn.linear_attention_backward(grad, out, *tensors, *ctx.settings)
    return *grads, *(None for _ in range(6))


linear_attention_op.register_autograd(_differentiate, setup_context=_setup)
