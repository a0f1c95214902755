"""The custom operators: opaque, one graph node for the compiler whatever runs behind it.

``torch.ops.dit_attn.sparse_attention`` is differentiable; ``torch.ops.dit_attn.fused_attention`` takes the optional
terms as well and is for inference. Their arguments are flat tensors and numbers. The implementations of the first are
in ``IMPLEMENTATIONS`` by name, those of the second in ``FUSED``; a new one is an entry with a forward and a backward
function, or a forward function that computes the terms.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from dit_attn.kernels.backends.compose_terms import with_terms_in_place
from dit_attn.kernels.backends.cpp.forward import cpp_attention, cpp_with_terms
from dit_attn.kernels.backends.gather.backward import gather_backward
from dit_attn.kernels.backends.gather.flash import gather_flash
from dit_attn.kernels.backends.gather.forward import gather_attention
from dit_attn.kernels.device import full_precision, lse_dtype
from dit_attn.kernels.layouts.block_layout import BlockLayout
from dit_attn.kernels.layouts.element_masks import rebuild_mask
from dit_attn.kernels.problem import Problem
from dit_attn.kernels.terms import NO_TERMS, Compensation, Epilogue, LogitBias, Terms


@dataclass(frozen=True)
class Implementation:
    """The forward and the backward pass of a backend.

    Attributes:
        forward: ``(problem) -> (o, lse)``.
        backward: ``(problem, o, lse, grad_o, grad_lse, bias_grad) -> (dq, dk, dv, dbias | None)``.
    """

    forward: Callable[[Problem], tuple[torch.Tensor, torch.Tensor]]
    backward: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]]


def _triton_backward(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    from dit_attn.kernels.backends.triton.attention import triton_backward

    return triton_backward(*args, **kwargs)


def _triton_fused(problem: Problem, terms: Terms = NO_TERMS, tma: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    from dit_attn.kernels.backends.triton.attention import triton_forward

    return triton_forward(problem, terms, tma)


IMPLEMENTATIONS = {
    "gather": Implementation(gather_attention, gather_backward),
    "gather-bf16": Implementation(partial(gather_attention, rounded_logits=True), gather_backward),
    "gather-sdpa": Implementation(gather_flash, gather_backward),
    "cpp": Implementation(cpp_attention, gather_backward),
    "triton": Implementation(_triton_fused, _triton_backward),
}
FUSED: dict[str, Callable[[Problem, Terms], tuple[torch.Tensor, torch.Tensor]]] = {
    "gather": partial(with_terms_in_place, attend=gather_attention),
    "gather-sdpa": partial(with_terms_in_place, attend=gather_flash),
    "cpp": cpp_with_terms,
    "triton": _triton_fused,
    "triton-tma": partial(_triton_fused, tma=True),
}

_CALL = (
    "Tensor q, Tensor k, Tensor v, Tensor kv_indices, Tensor kv_num_blocks, Tensor? full_kv_num_blocks, "
    "Tensor? mask_a, Tensor? mask_b, Tensor? key_mask, Tensor? key_bias, "
    "int mask_kind, SymInt[] mask_numbers, int q_block, int kv_block, float scale"
)
_TENSORS = 10  # number of tensors, the first arguments of a call
_BIAS = 9  # index of key_bias among them
_COMMON = _CALL + ", str backend"
_TERMS = (
    "Tensor? key_lengths, Tensor? bias_q, Tensor? bias_k, Tensor? comp_k, Tensor? comp_v, Tensor? comp_weight, "
    "Tensor? comp_variance, Tensor? comp_bias, Tensor? comp_left_out, Tensor? comp_first_order, "
    "Tensor? row_scale, Tensor? lse_ref, Tensor? add, Tensor? blend, "
    "int comp_tokens, float comp_cap, float lse_cap, int value_shift"
)


def flat_call(problem: Problem) -> tuple[Any, ...]:
    """Flatten a call into the arguments of an operator."""
    layout, mask = problem.layout, problem.layout.elements
    a, b = (None, None) if mask is None else mask.tensors()
    return (
        problem.q, problem.k, problem.v, layout.kv_indices, layout.kv_num_blocks, layout.full_kv_num_blocks, a, b,
        problem.key_mask, problem.key_bias,
        0 if mask is None else mask.kind, [] if mask is None else list(mask.numbers()),
        layout.q_block, layout.kv_block, problem.scale,
    )  # fmt: skip


def flat_terms(terms: Terms) -> tuple[Any, ...]:
    """Flatten the optional terms into the arguments of an operator."""
    bias, comp, end = terms.bias, terms.compensation, terms.epilogue or Epilogue()
    names = ("k", "v", "log_weight", "variance", "bias", "left_out", "first_order")
    return (
        terms.key_lengths,
        *((None, None) if bias is None else (bias.q, bias.k)),
        *(None if comp is None else getattr(comp, name) for name in names),
        end.row_scale, end.lse_ref, end.add, end.blend,
        1 if comp is None else comp.tokens, 0.0 if comp is None else comp.cap, end.cap, end.value_shift,
    )  # fmt: skip


def _problem(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv_indices: torch.Tensor,
    kv_num_blocks: torch.Tensor,
    full_kv_num_blocks: torch.Tensor | None,
    mask_a: torch.Tensor | None,
    mask_b: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    key_bias: torch.Tensor | None,
    mask_kind: int,
    mask_numbers: list[int],
    q_block: int,
    kv_block: int,
    scale: float,
) -> Problem:
    elements = rebuild_mask(mask_kind, mask_numbers, mask_a, mask_b) if mask_kind else None
    sizes = (q_block, kv_block, q.shape[1], k.shape[1])
    layout = BlockLayout(*sizes, kv_indices, kv_num_blocks, full_kv_num_blocks=full_kv_num_blocks, elements=elements)
    return Problem(q, k, v, layout, scale, key_mask, key_bias)


def _terms(*args: Any) -> Terms:
    key_lengths, bias_q, bias_k, ck, cv, cw, cvar, cbias, left_out, slope, *rest = args
    row_scale, lse_ref, add, blend, *numbers = rest
    tokens, ccap, cap, shift = numbers
    bias = None if bias_q is None else LogitBias(bias_q, bias_k)
    comp = None if ck is None else Compensation(ck, cv, cw, tokens, cvar, ccap, cbias, left_out, slope)
    given = any(x is not None for x in (row_scale, lse_ref, add, blend))
    return Terms(key_lengths, bias, comp, Epilogue(row_scale, lse_ref, cap, add, blend, shift) if given else None)


def _forward(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    q, backend = args[0], args[-1]
    with full_precision(q.device):
        return IMPLEMENTATIONS[backend].forward(_problem(*args[:-1]))


def _backward(*args: Any) -> tuple[torch.Tensor, ...]:
    out, lse, grad_out, grad_lse, *inputs, backend = args
    with full_precision(out.device):
        dq, dk, dv, db = IMPLEMENTATIONS[backend].backward(
            _problem(*inputs), out, lse, grad_out, grad_lse, bias_grad=inputs[_BIAS] is not None
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


def _fused(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    call = len(args) - _TERM_COUNT - 1
    with full_precision(args[0].device):
        return FUSED[args[-1]](_problem(*args[:call]), _terms(*args[call:-1]))


_TERM_COUNT = _TERMS.count(",") + 1
fused_attention_op = torch.library.custom_op(
    "dit_attn::fused_attention", _fused, mutates_args=(), schema=f"({_CALL}, {_TERMS}, str backend) -> (Tensor, Tensor)"
)


@fused_attention_op.register_fake
@sparse_attention_op.register_fake
def _(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    out = q.new_empty(q.shape[0], q.shape[1], q.shape[2], v.shape[3])
    return out, q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=lse_dtype(q.dtype))


@_backward_op.register_fake
def _(*args: Any) -> tuple[torch.Tensor, ...]:
    q, k, v, bias = args[4], args[5], args[6], args[4 + _BIAS]
    grads = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    return (*grads, q.new_empty(0) if bias is None else bias.new_empty(bias.shape))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    tensors, ctx.numbers = inputs[:_TENSORS], inputs[_TENSORS:]
    ctx.save_for_backward(*output, *tensors)


def _differentiate(ctx: Any, grad_out: torch.Tensor, grad_lse: torch.Tensor) -> tuple[Any, ...]:
    out, lse, *tensors = ctx.saved_tensors
    dq, dk, dv, db = torch.ops.dit_attn.sparse_attention_backward(out, lse, grad_out, grad_lse, *tensors, *ctx.numbers)
    between = [None] * (_BIAS - 3)
    return dq, dk, dv, *between, None if tensors[_BIAS] is None else db, *(None for _ in ctx.numbers)


sparse_attention_op.register_autograd(_differentiate, setup_context=_setup)


def _flops(
    q: Any, k: Any, v: Any, kv_indices: Any, *args: Any, factor: int, out_shape: Any = None, **kwargs: Any
) -> int:
    """Multiplications and additions of the tiles in the lists; the width of a list is taken for its count."""
    batch, rows, heads, dim = q
    kv_block = args[_TENSORS - 4 + 3]
    return factor * batch * heads * rows * kv_indices[-1] * kv_block * (dim + v[-1])


def _backward_flops(out: Any, lse: Any, grad_out: Any, grad_lse: Any, *args: Any, **kwargs: Any) -> int:
    return _flops(*args, factor=5, **kwargs)  # five products against the forward pass's two


register_flop_formula(torch.ops.dit_attn.sparse_attention)(partial(_flops, factor=2))
register_flop_formula(torch.ops.dit_attn.fused_attention)(partial(_flops, factor=2))
register_flop_formula(torch.ops.dit_attn.sparse_attention_backward)(_backward_flops)
