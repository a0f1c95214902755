"""The operator every method calls, and the choice of the backend that runs it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from dit_attn.errors import DitAttnError, unknown
from dit_attn.kernels.gather import cpu_has_bf16
from dit_attn.kernels.layout import BlockLayout
from dit_attn.kernels.op import IMPLEMENTATIONS, sparse_attention_op
from dit_attn.kernels.reference import reference_attention
from dit_attn.kernels.tiling import Problem
from dit_attn.kernels.validation import check_call

Result = tuple[torch.Tensor, torch.Tensor | None]


@dataclass(frozen=True)
class Facts:
    """What decides about a backend; all of it is known without reading a device.

    Attributes:
        device: of q.
        dtype: of q.
        head_dim: D.
        layout: the layout.
        lse: whether the log-sum is asked for.
        keys_altered: whether a key mask or a key bias is given.
    """

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    layout: BlockLayout
    lse: bool = False
    keys_altered: bool = False


@dataclass(frozen=True)
class Backend:
    """One way to run a call.

    Attributes:
        run: ``(problem, lse asked for) -> (o, lse | None)``.
        refuse: why it cannot run a call, or ``None``.
        on_request: why it is never picked by itself, or ``None``.
    """

    run: Callable[[Problem, bool], Result]
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
    return_lse: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention in which every query block reads only its key blocks.

    Differentiable in q, k, v and key_bias. Under autocast, q, k and v are cast like torch's own attention.

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
        o (B, Sq, H, Dv) in q's dtype, and with ``return_lse`` lse (B, H, Sq) fp32 (fp64 for fp64 input), natural
        logarithm. A row that reads no key gives 0 and ``-inf``. What stands in blocks that are not read is never seen.

    Raises:
        DitAttnError: an argument does not fit, or the forced backend cannot run the call; the message says what to do.
    """
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = (x.to(dtype) if x.dtype != torch.float64 else x for x in (q, k, v))
    check_call(q, k, v, layout, key_mask, key_bias)
    name = _resolve(backend, _facts(q, layout, return_lse, key_mask, key_bias))
    problem = Problem(q, k, v, layout, q.shape[-1] ** -0.5 if scale is None else scale, key_mask, key_bias)
    out, lse = BACKENDS[name].run(problem, return_lse)
    if not return_lse:
        return out
    assert lse is not None
    return out, lse


def choose_backend(
    q: torch.Tensor,
    layout: BlockLayout,
    *,
    return_lse: bool = False,
    key_mask: torch.Tensor | None = None,
    key_bias: torch.Tensor | None = None,
) -> Choice:
    """The backend :func:`sparse_attention` would use, and why not the others.

    Args:
        q: the queries (device, dtype and sizes are looked at).
        layout: the layout.
        return_lse: whether the log-sum is asked for.
        key_mask, key_bias: as they would be passed.
    """
    return _choose(_facts(q, layout, return_lse, key_mask, key_bias))


def _facts(
    q: torch.Tensor,
    layout: BlockLayout,
    return_lse: bool,
    key_mask: torch.Tensor | None,
    key_bias: torch.Tensor | None,
) -> Facts:
    altered = key_mask is not None or key_bias is not None
    return Facts(q.device, q.dtype, q.shape[-1], layout, return_lse, altered)


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


# -- backends, the preferred one first ---------------------------------------------------------------------------------


def _sdpa(problem: Problem, lse: bool) -> Result:
    q, k, v = (x.transpose(1, 2) for x in (problem.q, problem.k, problem.v))
    grouped = problem.ratio > 1
    return F.scaled_dot_product_attention(q, k, v, scale=problem.scale, enable_gqa=grouped).transpose(1, 2), None


def _refuse_sdpa(facts: Facts) -> str | None:
    if not facts.layout.is_dense:
        return "the layout is not known to be dense"
    if facts.lse:
        return "it has no log-sum output"
    return "it does not protect rows without keys under a key mask or bias" if facts.keys_altered else None


def _gather(problem: Problem, lse: bool) -> Result:
    return _gathered(problem, "gather")


def _gather_bf16(problem: Problem, lse: bool) -> Result:
    # A backward pass recomputes the logits in fp32 and needs a log-sum that belongs to them.
    return _gathered(problem, "gather" if _wants_grad(problem) else "gather-bf16")


def _refuse_gather_bf16(facts: Facts) -> str | None:
    if facts.device.type != "cpu" or facts.dtype != torch.bfloat16:
        return "it is for bf16 on a CPU"
    if not cpu_has_bf16():
        return "this CPU does not multiply bf16 itself"
    return "its log-sum is not exact enough" if facts.lse else None


def _wants_grad(problem: Problem) -> bool:
    tensors = (problem.q, problem.k, problem.v, problem.key_bias)
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _gathered(problem: Problem, name: str) -> Result:
    if not _wants_grad(problem) and not torch.compiler.is_compiling():
        with torch.autocast(problem.q.device.type, enabled=False):
            return IMPLEMENTATIONS[name].forward(problem)  # the same function without the operator's overhead
    layout = problem.layout
    return sparse_attention_op(
        problem.q,
        problem.k,
        problem.v,
        layout.kv_idx,
        layout.kv_cnt,
        problem.key_mask,
        problem.key_bias,
        layout.q_block,
        layout.kv_block,
        problem.scale,
        name,
    )


def _reference(problem: Problem, lse: bool) -> Result:
    p = problem
    return reference_attention(
        p.q, p.k, p.v, p.layout, scale=p.scale, key_mask=p.key_mask, key_bias=p.key_bias
    )


BACKENDS = {
    "sdpa": Backend(_sdpa, _refuse_sdpa),
    "gather-bf16": Backend(_gather_bf16, _refuse_gather_bf16),
    "gather": Backend(_gather, lambda facts: None),
    "reference": Backend(_reference, lambda facts: None, on_request="builds the whole S x S map; only on request"),
}
