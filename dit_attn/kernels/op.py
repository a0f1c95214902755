"""The opaque operator ``torch.ops.dit_attn.sparse_attention``: one graph node for the compiler, gradients included.

Its arguments are flat tensors and numbers. Kernels that read device memory behind it are listed in ``IMPLEMENTATIONS``
by name; a new one is an entry with a forward and a backward function.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from dit_attn.kernels.gather import gather_attention
from dit_attn.kernels.gather_backward import gather_backward
from dit_attn.kernels.layout import BlockLayout
from dit_attn.kernels.tiling import Problem


@dataclass(frozen=True)
class Implementation:
    """The two passes of a kernel.

    Attributes:
        forward: ``(problem) -> (o, lse)``.
        backward: ``(problem, o, lse, grad_o, grad_lse, bias_grad) -> (dq, dk, dv, dbias | None)``.
    """

    forward: Callable[[Problem], tuple[torch.Tensor, torch.Tensor]]
    backward: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]]


IMPLEMENTATIONS = {
    "gather": Implementation(gather_attention, gather_backward),
    "gather-bf16": Implementation(partial(gather_attention, rounded_logits=True), gather_backward),
}

_COMMON = (
    "Tensor q, Tensor k, Tensor v, Tensor kv_idx, Tensor kv_cnt, Tensor? key_mask, Tensor? key_bias, "
    "int q_block, int kv_block, float scale, str backend"
)


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    """Type of the log-sum for inputs of a type: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _problem(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv_idx: torch.Tensor,
    kv_cnt: torch.Tensor,
    key_mask: torch.Tensor | None,
    key_bias: torch.Tensor | None,
    q_block: int,
    kv_block: int,
    scale: float,
) -> Problem:
    layout = BlockLayout(q_block, kv_block, q.shape[1], k.shape[1], kv_idx, kv_cnt)
    return Problem(q, k, v, layout, scale, key_mask, key_bias)


def _forward(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    q, backend = args[0], args[-1]
    with torch.autocast(q.device.type, enabled=False):
        return IMPLEMENTATIONS[backend].forward(_problem(*args[:-1]))


def _backward(*args: Any) -> tuple[torch.Tensor, ...]:
    out, lse, grad_out, grad_lse, *inputs, backend = args
    with torch.autocast(out.device.type, enabled=False):
        dq, dk, dv, db = IMPLEMENTATIONS[backend].backward(
            _problem(*inputs), out, lse, grad_out, grad_lse, bias_grad=inputs[6] is not None
        )
    return dq, dk, dv, out.new_empty(0) if db is None else db


sparse_attention_op = torch.library.custom_op(
    "dit_attn::sparse_attention", _forward, mutates_args=(), schema=f"({_COMMON}) -> (Tensor, Tensor)"
)
_backward_op = torch.library.custom_op(
    "dit_attn::sparse_attention_backward",
    _backward,
    mutates_args=(),
    schema=(
        f"(Tensor out, Tensor lse, Tensor grad_out, Tensor grad_lse, {_COMMON}) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
)


@sparse_attention_op.register_fake
def _(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    out = q.new_empty(q.shape[0], q.shape[1], q.shape[2], v.shape[3])
    return out, q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=lse_dtype(q.dtype))


@_backward_op.register_fake
def _(*args: Any) -> tuple[torch.Tensor, ...]:
    q, k, v, bias = args[4], args[5], args[6], args[10]
    grads = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    return (*grads, q.new_empty(0) if bias is None else bias.new_empty(bias.shape))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    tensors, ctx.numbers = inputs[:7], inputs[7:]
    ctx.save_for_backward(*output, *tensors)


def _differentiate(ctx: Any, grad_out: torch.Tensor, grad_lse: torch.Tensor) -> tuple[Any, ...]:
    out, lse, *tensors = ctx.saved_tensors
    dq, dk, dv, db = torch.ops.dit_attn.sparse_attention_backward(
        out, lse, grad_out, grad_lse, *tensors, *ctx.numbers
    )
    return dq, dk, dv, None, None, None, None if tensors[6] is None else db, *(None for _ in ctx.numbers)


sparse_attention_op.register_autograd(_differentiate, setup_context=_setup)
