"""The public attention operator, ``sparse_attention``, and the choice of its backend."""

from __future__ import annotations

import torch

from dit_attn.errors import unknown
from dit_attn.kernels.backends.registry import BACKENDS, Choice, call_info, choose, contenders, resolve
from dit_attn.kernels.layouts.block_layout import BlockLayout
from dit_attn.kernels.numeric_guard import check_result
from dit_attn.kernels.problem import Problem
from dit_attn.kernels.terms import NO_TERMS, Compensation, Epilogue, LogitBias, Terms
from dit_attn.kernels.validation import check_call, check_kinds, check_scale


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
    """Compute softmax attention in which every query block attends only to its key blocks.

    Differentiable in q, k, v, key_bias and the tensors of the optional terms. Under autocast, q, k and v are cast as
    for ``F.scaled_dot_product_attention``.

    Args:
        q: (B, Sq, H, D); fp32, fp16, bf16 or fp64, any strides.
        k: (B, Sk, Hk, D); ``H % Hk == 0`` (query head h attends to key head ``h // (H / Hk)``).
        v: (B, Sk, Hk, Dv).
        layout: key blocks of every query block; its batch and head sizes are 1 or B and H.
        scale: softmax scale, 0 (uniform attention) or 1e-30 to 1e30, default ``D ** -0.5``.
        key_mask: (B, Sk) bool, keys that exist.
        key_bias: (B|1, H|1, Sk), added to the logits, natural logarithm.
        key_lengths: (B,) int32, how many keys of each sample exist, counted from the first; cheaper than a mask.
        bias: low-rank bias of the logits.
        compensation: pooled keys that stand for the skipped blocks in the same softmax.
        epilogue: operations on the output rows.
        return_lse: also return the log-sum-exp of each row, pooled keys included.
        tensor_layout: ``"bshd"`` as above, or ``"bhsd"`` for q, k, v and o as (B, H, S, D); neither makes a copy.
        backend: a name of ``BACKENDS`` to force it; ``None`` picks by capability (see :func:`choose_backend`).

    Returns:
        o (B, Sq, H, Dv) in q's dtype, and with ``return_lse`` lse (B, H, Sq) fp32 (fp64 for fp64 input), natural
        logarithm. A row without a key gives 0 and ``-inf``. Keys of skipped blocks may be NaN or infinite; a key that
        only an element mask leaves out must be finite.

    Raises:
        DitAttnError: an argument does not fit, or the forced backend cannot run the call; the message gives the remedy.
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
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if scale == 0.0:  # kernels may divide by it, and BLAS leaves the output of a product with alpha 0 unwritten
        q, scale = q * 0.0, 1.0
    problem = Problem(q, k, v, layout, scale, key_mask, key_bias)
    name = resolve(backend, call_info(problem, terms, return_lse))
    out, lse = BACKENDS[name].run(problem, terms, return_lse)
    check_result(name, problem, terms, out)
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
    """Return the backend :func:`sparse_attention` would use, with the reasons against the others.

    Args:
        q: (B, Sq, H, D) queries; only device, dtype and sizes matter.
        layout: the block layout of the call.
        v: (B, Sk, Hk, Dv) values, if their head size differs from that of q.
        return_lse: whether the log-sum-exp is requested.
        key_mask, key_bias: as for :func:`sparse_attention`.
        terms: the optional terms of the call.

    Raises:
        DitAttnError: ``q`` is no tensor, or ``layout`` no layout.
    """
    check_kinds(q=q, layout=layout)
    return choose(call_info(Problem(q, q, q if v is None else v, layout, 1.0, key_mask, key_bias), terms, return_lse))


def contending_backends(q: torch.Tensor, layout: BlockLayout) -> tuple[str, ...]:
    """Return the backends among which only a measurement can choose for a plain call, as preferred so far.

    One alone, the backend that is chosen, where there is nothing to measure.

    Args:
        q: (B, S, H, D) queries; only device, dtype and sizes matter.
        layout: the block layout of the call.
    """
    return contenders(call_info(Problem(q, q, q, layout, 1.0, None, None), NO_TERMS, False))
