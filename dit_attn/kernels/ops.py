"""The operator every method calls, and the choice of the backend that runs it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from dit_attn.errors import DitAttnError, unknown
from dit_attn.kernels.device import allows_tf32, full_precision, refuse_descriptors, refuse_triton_device
from dit_attn.kernels.gather import cpu_has_bf16
from dit_attn.kernels.guard import guarded
from dit_attn.kernels.layout import BlockLayout
from dit_attn.kernels.op import IMPLEMENTATIONS, flat_call, flat_terms, fused_attention_op, sparse_attention_op
from dit_attn.kernels.reference import reference_attention
from dit_attn.kernels.terms import NO_TERMS, Compensation, Epilogue, LogitBias, Terms, with_terms, with_terms_in_place
from dit_attn.kernels.tiling import Problem
from dit_attn.kernels.validation import check_call, check_kinds, check_scale

Result = tuple[torch.Tensor, torch.Tensor | None]


@dataclass(frozen=True)
class Facts:
    """What decides about a backend; all of it is known without reading a device.

    Attributes:
        device: of q.
        dtype: of q.
        head_dim: D.
        value_dim: Dv.
        layout: the layout.
        lse: whether the log-sum is asked for.
        keys_altered: whether a key mask or a key bias is given.
        terms: whether any optional term is given.
        grad: whether gradients are asked for.
    """

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    value_dim: int
    layout: BlockLayout
    lse: bool = False
    keys_altered: bool = False
    terms: bool = False
    grad: bool = False


@dataclass(frozen=True)
class Backend:
    """One way to run a call.

    Attributes:
        run: ``(problem, terms, lse asked for) -> (o, lse | None)``.
        refuse: why it cannot run a call, or ``None``.
        on_request: why it is never picked by itself, or ``None``.
    """

    run: Callable[[Problem, Terms, bool], Result]
    refuse: Callable[[Facts], str | None]
    on_request: str | None = None


@dataclass(frozen=True)
class Choice:
    """The backend for a call; prints as one line per backend.

    Attributes:
        backend: its name.
        reasons: why each of the other backends is not used, by name.
    """

    backend: str
    reasons: dict[str, str]

    def __str__(self) -> str:
        return "\n".join([f"{self.backend}: used", *(f"{name}: {reason}" for name, reason in self.reasons.items())])


def sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: BlockLayout,
    *,
    scale: float | None = None,
    key_mask: torch.Tensor | None = None,
    key_bias: torch.Tensor | None = None,
    key_lengths: torch.Tensor | None = None,
    bias: LogitBias | None = None,
    compensation: Compensation | None = None,
    epilogue: Epilogue | None = None,
    return_lse: bool = False,
    tensor_layout: str = "bshd",
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention in which every query block reads only its key blocks.

    Differentiable in q, k, v, key_bias and the tensors of the optional terms. Under autocast, q, k and v are cast like
    torch's own attention.

    Args:
        q: (B, Sq, H, D); fp32, fp16, bf16 or fp64, any strides.
        k: (B, Sk, Hk, D); ``H % Hk == 0`` (query head h reads key head ``h // (H / Hk)``).
        v: (B, Sk, Hk, Dv).
        layout: key blocks of every query block; its batch and head sizes are 1 or B and H.
        scale: softmax scale, at least 0, default ``D ** -0.5``.
        key_mask: (B, Sk) bool, keys that exist.
        key_bias: (B|1, H|1, Sk), added to the logits (natural logarithm).
        key_lengths: (B,) int32, how many keys of each sample exist, counted from the first; cheaper than a mask.
        bias: low-rank addition to the logits.
        compensation: virtual keys that stand for the skipped blocks in the same softmax.
        epilogue: what is done to the rows before they are written.
        return_lse: also return the logarithm of the softmax denominator (of everything read, virtual keys included).
        tensor_layout: ``"bshd"`` as above, or ``"bhsd"`` for q, k, v and o as (B, H, S, D); neither costs a copy.
        backend: a name of ``BACKENDS`` forces it; ``None`` picks by capability (:func:`choose_backend` says why).

    Returns:
        o (B, Sq, H, Dv) in q's dtype, and with ``return_lse`` lse (B, H, Sq) fp32 (fp64 for fp64 input), natural
        logarithm. A row that reads no key gives 0 and ``-inf``. What stands in blocks that are not read is never seen;
        a key that only an element mask leaves out must be finite.

    Raises:
        DitAttnError: an argument does not fit, or the forced backend cannot run the call; the message says what to do.
    """
    check_kinds(
        q=q, k=k, v=v, layout=layout, key_mask=key_mask, key_bias=key_bias, key_lengths=key_lengths, bias=bias,
        compensation=compensation, epilogue=epilogue,
    )  # fmt: skip
    check_scale(scale)
    if tensor_layout not in ("bshd", "bhsd"):
        raise unknown("tensor_layout", tensor_layout, ("bshd", "bhsd"))
    if tensor_layout == "bhsd":
        q, k, v = (x.transpose(1, 2) if x.ndim == 4 else x for x in (q, k, v))
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = (x.to(dtype) if x.dtype != torch.float64 else x for x in (q, k, v))
    terms = Terms(key_lengths, bias, compensation, epilogue)
    check_call(q, k, v, layout, key_mask, key_bias, terms)
    problem = Problem(q, k, v, layout, q.shape[-1] ** -0.5 if scale is None else scale, key_mask, key_bias)
    name = _resolve(backend, _facts(problem, terms, return_lse))
    out, lse = BACKENDS[name].run(problem, terms, return_lse)
    guarded(name, problem, terms, out)
    out = out.transpose(1, 2) if tensor_layout == "bhsd" else out
    if not return_lse:
        return out
    assert lse is not None
    return out, lse


def choose_backend(
    q: torch.Tensor,
    layout: BlockLayout,
    *,
    v: torch.Tensor | None = None,
    return_lse: bool = False,
    key_mask: torch.Tensor | None = None,
    key_bias: torch.Tensor | None = None,
    terms: Terms = NO_TERMS,
) -> Choice:
    """The backend :func:`sparse_attention` would use, and why not the others.

    Args:
        q: (B, Sq, H, D) queries (device, dtype and sizes are looked at).
        layout: the layout.
        v: the values, where their head size is not that of q.
        return_lse: whether the log-sum is asked for.
        key_mask, key_bias: as they would be passed.
        terms: the optional terms, as they would be passed.
    """
    check_kinds(q=q, layout=layout)
    return _choose(_facts(Problem(q, q, q if v is None else v, layout, 1.0, key_mask, key_bias), terms, return_lse))


def _facts(problem: Problem, terms: Terms, return_lse: bool) -> Facts:
    q = problem.q
    altered = problem.key_mask is not None or problem.key_bias is not None
    return Facts(
        q.device, q.dtype, q.shape[-1], problem.v.shape[-1], problem.layout, return_lse, altered, bool(terms),
        _wants_grad(problem, terms),
    )  # fmt: skip


def _choose(facts: Facts) -> Choice:
    chosen, reasons = "", {}
    for name, backend in BACKENDS.items():
        refusal = backend.refuse(facts) or backend.on_request
        if refusal is None and not chosen:
            chosen = name
        else:
            reasons[name] = refusal or f"{chosen} comes first"
    return Choice(chosen, reasons)


def _resolve(backend: str | None, facts: Facts) -> str:
    if backend is None:
        return _choose(facts).backend
    if backend not in BACKENDS:
        raise unknown("attention backend", backend, BACKENDS)
    refusal = BACKENDS[backend].refuse(facts)
    if refusal:
        raise DitAttnError(f"backend {backend!r} cannot run this call: {refusal}; use backend='gather' or leave it out")
    return backend


def _wants_grad(problem: Problem, terms: Terms) -> bool:
    tensors: list[Any] = [problem.q, problem.k, problem.v, problem.key_bias]
    if terms:
        tensors += flat_terms(terms)
    return torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in tensors)


# -- dense -------------------------------------------------------------------------------------------------------------


def _sdpa(problem: Problem, terms: Terms, lse: bool) -> Result:
    q, k, v = (x.transpose(1, 2) for x in (problem.q, problem.k, problem.v))
    grouped = problem.ratio > 1
    return F.scaled_dot_product_attention(q, k, v, scale=problem.scale, enable_gqa=grouped).transpose(1, 2), None


def _refuse_sdpa(facts: Facts) -> str | None:
    if not facts.layout.is_dense:
        return "the layout is not known to be dense"
    if facts.lse:
        return "it has no log-sum output"
    if facts.terms:
        return "it has none of the optional terms"
    return "it does not protect rows without keys under a key mask or bias" if facts.keys_altered else None


# -- Triton ------------------------------------------------------------------------------------------------------------


def _triton(problem: Problem, terms: Terms, lse: bool, name: str = "triton") -> Result:
    if _wants_grad(problem, terms):
        return with_terms(problem, terms, _differentiable) if terms else _differentiable(problem)
    return fused_attention_op(*flat_call(problem), *flat_terms(terms), name)


def _differentiable(problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """By the Triton kernels where they can; a bias widens the heads, which they may not be able to follow."""
    refusal = _refuse_triton(_facts(problem, NO_TERMS, True))
    return sparse_attention_op(*flat_call(problem), "gather" if refusal else "triton")


def _triton_tma(problem: Problem, terms: Terms, lse: bool) -> Result:
    return _triton(problem, terms, lse, "triton-tma")


def _refuse_triton(facts: Facts) -> str | None:
    refusal = refuse_triton_device(facts.device)
    if refusal:
        return refusal
    if facts.dtype == torch.float64:
        return "Triton kernels compute in fp32 at most"
    if facts.head_dim != facts.value_dim:
        return f"k and v differ in head size, {facts.head_dim} and {facts.value_dim}"
    if not 16 <= facts.head_dim <= 128:
        return f"head size {facts.head_dim} is not within 16 to 128"
    for name, block in (("q_block", facts.layout.q_block), ("kv_block", facts.layout.kv_block)):
        if block % 16:
            return f"{name} {block} is not a multiple of 16"
    if facts.grad and facts.dtype == torch.float32 and facts.device.type == "cuda" and not allows_tf32():
        return "its gradients in full fp32 spill registers (torch.backends.cuda.matmul.allow_tf32 lifts this)"
    return None


def _refuse_tma(facts: Facts) -> str | None:
    refusal = _refuse_triton(facts) or refuse_descriptors(facts.device)
    return refusal or ("it has no gradients" if facts.grad else None)


# -- gather ------------------------------------------------------------------------------------------------------------


def _gather(problem: Problem, terms: Terms, lse: bool) -> Result:
    if not terms:
        return _gathered(problem)
    if torch.compiler.is_compiling() and not _wants_grad(problem, terms):
        return fused_attention_op(*flat_call(problem), *flat_terms(terms), "gather")
    around = with_terms if _wants_grad(problem, terms) else with_terms_in_place
    with full_precision(problem.q.device):  # sums and products of the terms are in fp32
        return around(problem, terms, _gathered)


def _gather_bf16(problem: Problem, terms: Terms, lse: bool) -> Result:
    # A backward pass recomputes the logits in fp32 and needs a log-sum that belongs to them.
    return _gathered(problem, "gather" if _wants_grad(problem, terms) else "gather-bf16")


def _refuse_gather_bf16(facts: Facts) -> str | None:
    if facts.device.type != "cpu" or facts.dtype != torch.bfloat16:
        return "it is for bf16 on a CPU"
    if not cpu_has_bf16():
        return "this CPU does not multiply bf16 itself"
    return "its log-sum is not exact enough" if facts.lse or facts.terms else None


def _gathered(problem: Problem, name: str = "gather") -> tuple[torch.Tensor, torch.Tensor]:
    if not _wants_grad(problem, NO_TERMS) and not torch.compiler.is_compiling():
        with full_precision(problem.q.device):
            return IMPLEMENTATIONS[name].forward(problem)  # the same function without the operator's overhead
    return sparse_attention_op(*flat_call(problem), name)


# -- on request --------------------------------------------------------------------------------------------------------


def _flex(problem: Problem, terms: Terms, lse: bool) -> Result:
    from dit_attn.kernels.flex import flex_backend

    return flex_backend(problem)


def _refuse_flex(facts: Facts) -> str | None:
    if facts.terms or facts.keys_altered:
        return "it has no key mask, bias or other optional term here"
    blocks = (facts.layout.q_block, facts.layout.kv_block)
    if facts.device.type == "cuda" and any(block % 128 and 128 % block for block in blocks):
        return f"its blocks divide 128 or are multiples of it, these are {blocks[0]} x {blocks[1]}"
    return "it computes in fp32 at most" if facts.dtype == torch.float64 else None


def _reference(problem: Problem, terms: Terms, lse: bool) -> Result:
    return with_terms(problem, terms, _referenced) if terms else _referenced(problem)


def _referenced(p: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    return reference_attention(p.q, p.k, p.v, p.layout, scale=p.scale, key_mask=p.key_mask, key_bias=p.key_bias)


BACKENDS = {
    "sdpa": Backend(_sdpa, _refuse_sdpa),
    "triton": Backend(_triton, _refuse_triton),
    "gather-bf16": Backend(_gather_bf16, _refuse_gather_bf16),
    "gather": Backend(_gather, lambda facts: None),
    "triton-tma": Backend(_triton_tma, _refuse_tma, on_request="loads by tensor descriptors; only on request"),
    "flex": Backend(_flex, _refuse_flex, on_request="torch's FlexAttention on the same layout; only on request"),
    "reference": Backend(_reference, lambda facts: None, on_request="builds the whole S x S map; only on request"),
}
