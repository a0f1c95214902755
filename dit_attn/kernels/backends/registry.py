"""The registry of backends: how each one runs a call, why it cannot run one, and which one is chosen.

``BACKENDS`` lists them in order of preference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from dit_attn.errors import DitAttnError, unknown
from dit_attn.kernels.backends.compose_terms import with_terms
from dit_attn.kernels.backends.cpp import library
from dit_attn.kernels.backends.custom_ops import (
    FUSED,
    IMPLEMENTATIONS,
    flat_call,
    flat_terms,
    fused_attention_op,
    sparse_attention_op,
)
from dit_attn.kernels.backends.gather.flash import has_flash
from dit_attn.kernels.backends.gather.forward import cpu_has_bf16
from dit_attn.kernels.backends.kitchen import DTYPES as KITCHEN_DTYPES
from dit_attn.kernels.backends.kitchen import HEAD_DIM as KITCHEN_HEAD_DIM
from dit_attn.kernels.backends.kitchen import kitchen_attention, unsupported_reason_kitchen
from dit_attn.kernels.backends.preference import ALWAYS, CPP, FLASH, Preference, prefer_cpp, prefer_flash
from dit_attn.kernels.backends.reference import reference_attention
from dit_attn.kernels.device import (
    allows_tf32,
    full_precision,
    unsupported_reason_descriptors,
    unsupported_reason_triton,
)
from dit_attn.kernels.layouts.block_layout import BlockLayout
from dit_attn.kernels.problem import Problem
from dit_attn.kernels.terms import NO_TERMS, Terms

TRITON_RANK = 16  # columns of a low-rank bias in one product
_ON_CPU = ("gather-bf16", "gather", FLASH, CPP)  # any of them may be the fastest there

Result = tuple[torch.Tensor, torch.Tensor | None]


@dataclass(frozen=True)
class CallInfo:
    """The properties of a call that decide its backend; all are known without reading a device.

    Attributes:
        device, dtype: of q.
        head_dim: D.
        value_dim: Dv.
        layout: the block layout.
        lse: whether the log-sum-exp is requested.
        keys_altered: whether a key mask or a key bias is given.
        terms: whether any optional term is given.
        rank: columns of the low-rank bias, 0 without one.
        grad: whether gradients are requested.
    """

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    value_dim: int
    layout: BlockLayout
    lse: bool = False
    keys_altered: bool = False
    terms: bool = False
    rank: int = 0
    grad: bool = False


@dataclass(frozen=True)
class Backend:
    """An implementation of the operator.

    Attributes:
        run: ``(problem, terms, lse requested) -> (o, lse | None)``.
        unsupported_reason: returns why it cannot run a call, or ``None``.
        on_request: why it is only used when named, or ``None``.
        preference: returns whether it is chosen for a call it can run, and why.
    """

    run: Callable[[Problem, Terms, bool], Result]
    unsupported_reason: Callable[[CallInfo], str | None]
    on_request: str | None = None
    preference: Callable[[CallInfo], Preference] = lambda info: ALWAYS


@dataclass(frozen=True)
class Choice:
    """The backend chosen for a call; prints as one line per backend.

    Attributes:
        backend: its name.
        reasons: why each of the other backends is not used, by name.
        why: what of this machine it was chosen for; empty where its place in the list decides.
    """

    backend: str
    reasons: dict[str, str]
    why: str = ""

    def __str__(self) -> str:
        used = f"{self.backend}: used{self.why and f', {self.why}'}"
        return "\n".join([used, *(f"{name}: {reason}" for name, reason in self.reasons.items())])


def call_info(problem: Problem, terms: Terms, return_lse: bool) -> CallInfo:
    """Collect the properties of a call that decide its backend."""
    q = problem.q
    altered = problem.key_mask is not None or problem.key_bias is not None
    return CallInfo(
        q.device, q.dtype, q.shape[-1], problem.v.shape[-1], problem.layout, return_lse, altered, bool(terms),
        0 if terms.bias is None else terms.bias.q.shape[-1], _wants_grad(problem, terms),
    )  # fmt: skip


def choose(info: CallInfo) -> Choice:
    """Choose the first backend that can run a call."""
    chosen, why, reasons = "", "", {}
    for name, backend in BACKENDS.items():
        reason = backend.unsupported_reason(info) or backend.on_request
        preference = backend.preference(info) if reason is None and not chosen else ALWAYS
        if reason is None and not chosen and preference.chosen:
            chosen, why = name, preference.why
        else:
            reasons[name] = reason or preference.why or f"{chosen} comes first"
    return Choice(chosen, reasons, why)


def contenders(info: CallInfo) -> tuple[str, ...]:
    """Return the backends among which only a measurement can choose for a call, as preferred now; else the chosen."""
    chosen = choose(info).backend
    if info.device.type != "cpu" or chosen not in _ON_CPU:
        return (chosen,)
    wide = info.dtype.itemsize > 2  # torch's flash attention is for 16 bits on request alone
    able = (name for name in _able(info) if not (wide and name == FLASH))
    return tuple(sorted(able, key=lambda name: name != chosen))  # others keep their order


def _able(info: CallInfo) -> list[str]:
    """The backends for CPUs that can run a call."""
    return [name for name in _ON_CPU if BACKENDS[name].unsupported_reason(info) is None]


def resolve(backend: str | None, info: CallInfo) -> str:
    """Return the name of the backend that runs a call.

    Raises:
        DitAttnError: ``backend`` is unknown, or cannot run the call.
    """
    if backend is None:
        return choose(info).backend
    if backend not in BACKENDS:
        raise unknown("attention backend", backend, BACKENDS)
    reason = BACKENDS[backend].unsupported_reason(info)
    if reason:
        raise DitAttnError(f"backend {backend!r} cannot run this call: {reason}; use backend='gather' or leave it out")
    return backend


def _wants_grad(problem: Problem, terms: Terms) -> bool:
    tensors: list[Any] = [problem.q, problem.k, problem.v, problem.key_bias]
    if terms:
        tensors += flat_terms(terms)
    return torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in tensors)


def _sdpa(problem: Problem, terms: Terms, lse: bool) -> Result:
    q, k, v = (x.transpose(1, 2) for x in (problem.q, problem.k, problem.v))
    grouped = problem.ratio > 1
    return F.scaled_dot_product_attention(q, k, v, scale=problem.scale, enable_gqa=grouped).transpose(1, 2), None


def _unsupported_reason_sdpa(info: CallInfo) -> str | None:
    if not info.layout.is_dense:
        return "the layout is not known to be dense"
    if info.lse:
        return "it does not return the log-sum-exp"
    if info.terms:
        return "it supports none of the optional terms"
    return "it gives NaN for rows without keys under a key mask or bias" if info.keys_altered else None


def _triton(problem: Problem, terms: Terms, lse: bool, name: str = "triton") -> Result:
    composed = terms.compensation is not None and not terms.compensation.is_fused
    if composed or _wants_grad(problem, terms):
        return with_terms(problem, terms, _differentiable) if terms else _differentiable(problem)
    return fused_attention_op(*flat_call(problem), *flat_terms(terms), name)


def _differentiable(problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the Triton kernels where they support the call; a bias widens the heads, which may exceed their sizes."""
    reason = _unsupported_reason_triton(call_info(problem, NO_TERMS, True))
    return sparse_attention_op(*flat_call(problem), "gather" if reason else "triton")


def _triton_tma(problem: Problem, terms: Terms, lse: bool) -> Result:
    return _triton(problem, terms, lse, "triton-tma")


def _unsupported_reason_triton(info: CallInfo) -> str | None:
    reason = unsupported_reason_triton(info.device)
    if reason:
        return reason
    if info.dtype == torch.float64:
        return "Triton kernels compute in fp32 at most"
    if info.head_dim != info.value_dim:
        return f"k and v differ in head size, {info.head_dim} and {info.value_dim}"
    if not 16 <= info.head_dim <= 128:
        return f"head size {info.head_dim} is not within 16 to 128"
    if info.rank > TRITON_RANK:
        return f"a bias of {info.rank} columns; the kernels take {TRITON_RANK}"
    for name, block in (("q_block", info.layout.q_block), ("kv_block", info.layout.kv_block)):
        if block % 16:
            return f"{name} {block} is not a multiple of 16"
    if info.grad and info.dtype == torch.float32 and info.device.type == "cuda" and not allows_tf32():
        return "its gradients in full fp32 spill registers (torch.backends.cuda.matmul.allow_tf32 lifts this)"
    return None


def _unsupported_reason_tma(info: CallInfo) -> str | None:
    reason = _unsupported_reason_triton(info) or unsupported_reason_descriptors(info.device)
    return reason or ("it has no gradients" if info.grad else None)


def _gather(problem: Problem, terms: Terms, lse: bool, name: str = "gather") -> Result:
    if not terms:
        return _gathered(problem, name)
    if not _wants_grad(problem, terms):
        if torch.compiler.is_compiling():
            return fused_attention_op(*flat_call(problem), *flat_terms(terms), name)
        with full_precision(problem.q.device):  # sums and products of the terms run in fp32
            return FUSED[name](problem, terms)
    with full_precision(problem.q.device):
        return with_terms(problem, terms, partial(_gathered, name=name))


def _gather_bf16(problem: Problem, terms: Terms, lse: bool) -> Result:
    # A backward pass recomputes the logits in fp32 and needs the log-sum-exp that belongs to them.
    return _gathered(problem, "gather" if _wants_grad(problem, terms) else "gather-bf16")


def _unsupported_reason_gather_bf16(info: CallInfo) -> str | None:
    if info.device.type != "cpu" or info.dtype != torch.bfloat16:
        return "it is for bf16 on a CPU"
    if not cpu_has_bf16():
        return "this CPU has no bf16 matrix instructions"
    return "its log-sum-exp is not exact enough" if info.lse or info.terms else None


def _gather_sdpa(problem: Problem, terms: Terms, lse: bool) -> Result:
    return _gather(problem, terms, lse, FLASH)


def _unsupported_reason_gather_sdpa(info: CallInfo) -> str | None:
    if info.device.type != "cpu" or not has_flash():
        return "it is torch's flash attention for CPUs"
    if info.head_dim != info.value_dim:
        return f"k and v differ in head size, {info.head_dim} and {info.value_dim}"
    if info.rank:
        return "it adds no low-rank bias to the logits"
    return "it supports no element masks" if info.layout.elements is not None else None


def _cpp(problem: Problem, terms: Terms, lse: bool) -> Result:
    return _gather(problem, terms, lse, CPP)


def _unsupported_reason_cpp(info: CallInfo) -> str | None:
    if info.device.type != "cpu" or info.dtype not in library.TYPES:
        return "it is for fp32 and bf16 on a CPU"
    if info.head_dim != info.value_dim:
        return f"k and v differ in head size, {info.head_dim} and {info.value_dim}"
    if info.rank:
        return "it adds no low-rank bias to the logits"
    if info.layout.elements is not None:
        return "it supports no element masks"
    if info.dtype == torch.bfloat16 and (info.head_dim % 2 or info.layout.kv_block % 2):
        return f"for bf16 its head size and kv_block are even, these are {info.head_dim} and {info.layout.kv_block}"
    return library.unsupported_reason_here(info.dtype)


def _prefer_cpp(info: CallInfo) -> Preference:
    rivals = tuple(name for name in _able(info) if name != CPP)
    return prefer_cpp(info.layout, info.head_dim, info.dtype, info.grad, rivals)


def _prefer_gather_sdpa(info: CallInfo) -> Preference:
    rival = "gather" if _unsupported_reason_gather_bf16(info) else "gather-bf16"
    return prefer_flash(info.layout, info.head_dim, info.dtype, info.grad, rival)


def _gathered(problem: Problem, name: str = "gather") -> tuple[torch.Tensor, torch.Tensor]:
    if not _wants_grad(problem, NO_TERMS) and not torch.compiler.is_compiling():
        with full_precision(problem.q.device):
            return IMPLEMENTATIONS[name].forward(problem)  # the same function without the operator's overhead
    return sparse_attention_op(*flat_call(problem), name)


def _flex(problem: Problem, terms: Terms, lse: bool) -> Result:
    from dit_attn.kernels.backends.flex import flex_backend

    return flex_backend(problem)


def _unsupported_reason_flex(info: CallInfo) -> str | None:
    if info.terms or info.keys_altered:
        return "it supports no key mask, bias or other optional term here"
    blocks = (info.layout.q_block, info.layout.kv_block)
    if info.device.type == "cuda" and any(block % 128 and 128 % block for block in blocks):
        return f"its blocks divide 128 or are multiples of it, these are {blocks[0]} x {blocks[1]}"
    return "it computes in fp32 at most" if info.dtype == torch.float64 else None


def _kitchen(problem: Problem, terms: Terms, lse: bool) -> Result:
    return kitchen_attention(problem), None


def _unsupported_reason_kitchen(info: CallInfo) -> str | None:
    if not info.layout.is_dense:
        return "its sparse kernel takes no lists, it chooses the blocks itself; it runs dense layouts alone"
    if info.lse:
        return "it does not return the log-sum-exp"
    if info.terms or info.keys_altered:
        return "it supports no key mask, bias or other optional term here"
    if info.grad:
        return "it has no gradients"
    if info.head_dim != info.value_dim:
        return f"k and v differ in head size, {info.head_dim} and {info.value_dim}"
    if info.head_dim > KITCHEN_HEAD_DIM:
        return f"head size {info.head_dim} is above {KITCHEN_HEAD_DIM}"
    if info.dtype not in KITCHEN_DTYPES:
        return "it computes in 8 bits, for fp32, fp16 and bf16"
    if torch.compiler.is_compiling():
        return "torch.compile does not trace it"
    return unsupported_reason_kitchen(info.device)


def _reference(problem: Problem, terms: Terms, lse: bool) -> Result:
    return with_terms(problem, terms, _referenced) if terms else _referenced(problem)


def _referenced(p: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    return reference_attention(p.q, p.k, p.v, p.layout, scale=p.scale, key_mask=p.key_mask, key_bias=p.key_bias)


BACKENDS = {
    "sdpa": Backend(_sdpa, _unsupported_reason_sdpa),
    "triton": Backend(_triton, _unsupported_reason_triton),
    CPP: Backend(_cpp, _unsupported_reason_cpp, preference=_prefer_cpp),
    FLASH: Backend(_gather_sdpa, _unsupported_reason_gather_sdpa, preference=_prefer_gather_sdpa),
    "gather-bf16": Backend(_gather_bf16, _unsupported_reason_gather_bf16),
    "gather": Backend(_gather, lambda info: None),
    "triton-tma": Backend(_triton_tma, _unsupported_reason_tma, "loads by tensor descriptors; only on request"),
    "flex": Backend(_flex, _unsupported_reason_flex, "torch's FlexAttention on the same layout; only on request"),
    "comfy-kitchen": Backend(_kitchen, _unsupported_reason_kitchen, "rounds q, k and v to 8 bits; only on request"),
    "reference": Backend(_reference, lambda info: None, "builds the full S x S attention matrix; only on request"),
}
