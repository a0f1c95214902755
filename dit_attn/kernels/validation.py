"""Argument checks of an attention call, made once: one line that names the argument and the remedy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

import numpy as np
import torch

from dit_attn.errors import DitAttnError, shorten
from dit_attn.kernels.checks import INTS, check_heads, check_key_mask, check_tokens, dtype_name, is_whole
from dit_attn.kernels.device import host_readable
from dit_attn.kernels.layouts.block_layout import BlockLayout, ceil_div
from dit_attn.kernels.terms import Compensation, Epilogue, LogitBias, Terms

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
KINDS: dict[str, type] = {
    "q": torch.Tensor, "k": torch.Tensor, "v": torch.Tensor, "layout": BlockLayout, "key_mask": torch.Tensor,
    "key_bias": torch.Tensor, "key_lengths": torch.Tensor, "bias": LogitBias, "compensation": Compensation,
    "epilogue": Epilogue, "bias.q": torch.Tensor, "bias.k": torch.Tensor, "compensation.k": torch.Tensor,
    "compensation.v": torch.Tensor, "compensation.log_weight": torch.Tensor, "compensation.variance": torch.Tensor,
    "epilogue.row_scale": torch.Tensor, "epilogue.lse_ref": torch.Tensor, "epilogue.add": torch.Tensor,
    "epilogue.blend": torch.Tensor,
}  # fmt: skip
OPTIONAL = (
    "key_mask", "key_bias", "key_lengths", "bias", "compensation", "epilogue", "compensation.variance",
    "epilogue.row_scale", "epilogue.lse_ref", "epilogue.add", "epilogue.blend",
)  # fmt: skip
_DTYPES: dict[str, tuple[str, Callable[[torch.Tensor], bool]]] = {
    "key_lengths": ("an integer", lambda x: x.dtype in INTS),
    "compensation.left_out": ("a boolean", lambda x: x.dtype == torch.bool),
}
SCALES = (1e-30, 1e30)  # outside, fp32 logits lose every digit or overflow


def check_kinds(**given: Any) -> None:
    """Check that every argument is of its class (``KINDS``).

    Raises:
        DitAttnError: for the first one that is not.
    """
    for name, x in given.items():
        if isinstance(x, KINDS[name]) or (x is None and name in OPTIONAL):
            continue
        remedy = "see the documentation of sparse_attention"
        if name == "layout":
            is_plan = isinstance(getattr(x, "layout", None), BlockLayout)
            remedy = "pass its .layout" if is_plan else "make one with plan_blocks(...).layout or from_..."
        raise DitAttnError(f"{name} must be a {KINDS[name].__name__}, got {type(x).__name__}; {remedy}")


def check_scale(scale: float | None) -> None:
    """Check that the scale is ``None``, 0, or a number within ``SCALES``.

    Raises:
        DitAttnError: it is not.
    """
    if scale is None:
        return
    if not (_is_number(scale) and 0.0 <= scale < math.inf):
        raise DitAttnError(
            f"scale must be a finite number of at least 0, got {shorten(scale)}; to turn the sign of the logits, "
            "negate q"
        )
    if scale != 0.0 and not SCALES[0] <= scale <= SCALES[1]:
        raise DitAttnError(
            f"scale must be 0, or between {SCALES[0]:g} and {SCALES[1]:g}, got {shorten(scale)}; scale q or k instead"
        )


def check_call(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: BlockLayout,
    key_mask: torch.Tensor | None,
    key_bias: torch.Tensor | None,
    terms: Terms,
) -> None:
    """Check that the arguments of :func:`dit_attn.kernels.sparse_attention` fit together.

    Raises:
        DitAttnError: rank, type, device, head count, head size, layout, mask or an optional term does not fit.
    """
    _check_tensors(q, k, v)
    _check_heads(q, k, v)
    _check_layout(q, k, layout)
    _check_keys(q, k, key_mask, key_bias)
    if terms:
        _check_terms(q, k, v, layout, terms)


def _check_tensors(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.layout is not torch.strided or x.is_nested:
            raise DitAttnError(f"{name} must be a dense (strided) tensor, got {x.layout}; call .to_dense() first")
        if x.dtype not in DTYPES:
            types = ", ".join(map(dtype_name, DTYPES))
            raise DitAttnError(f"{name} has dtype {dtype_name(x.dtype)}; cast it to one of {types}")
        check_tokens(name, x)
        if x.shape[-1] == 0:
            raise DitAttnError(f"{name} has heads of size 0, {tuple(x.shape)}; split the channels with unflatten")
        if x.dtype != q.dtype or x.device != q.device:
            raise DitAttnError(
                f"{name} is {dtype_name(x.dtype)} on {x.device} and q is {dtype_name(q.dtype)} on {q.device}; "
                "q, k and v must share both: move or cast one"
            )


def _check_heads(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    if k.shape[:3] != v.shape[:3]:
        raise DitAttnError(f"k {tuple(k.shape)} and v {tuple(v.shape)} must agree in (B, S, H); pass matching tensors")
    check_heads(q, k)


def _check_layout(q: torch.Tensor, k: torch.Tensor, layout: BlockLayout) -> None:
    if (layout.q_len, layout.kv_len) != (q.shape[1], k.shape[1]):
        raise DitAttnError(
            f"layout is for {layout.q_len} x {layout.kv_len} tokens, q and k have {q.shape[1]} x {k.shape[1]}; "
            "build the layout for this sequence"
        )
    for axis, size, name in ((0, q.shape[0], "batch"), (1, q.shape[2], "head")):
        if layout.kv_num_blocks.shape[axis] not in (1, size):
            raise DitAttnError(
                f"layout has {layout.kv_num_blocks.shape[axis]} {name} entries, q has {size}; build it with 1 or {size}"
            )
    if layout.kv_indices.device != q.device:
        raise DitAttnError(f"layout is on {layout.kv_indices.device} and q on {q.device}; use layout.to(q.device)")
    layout.check_elements()


def _check_keys(q: torch.Tensor, k: torch.Tensor, key_mask: torch.Tensor | None, key_bias: torch.Tensor | None) -> None:
    batch, heads, keys = q.shape[0], q.shape[2], k.shape[1]
    check_key_mask(k, key_mask, shared=False)
    if key_bias is not None and (
        key_bias.ndim != 3
        or key_bias.shape[0] not in (1, batch)
        or key_bias.shape[1] not in (1, heads)
        or key_bias.shape[2] != keys
        or not key_bias.is_floating_point()
    ):
        raise DitAttnError(
            f"key_bias must be float (B|1, H|1, Sk) with B={batch}, H={heads}, Sk={keys}, "
            f"got {dtype_name(key_bias.dtype)} {tuple(key_bias.shape)}; use expand or unsqueeze"
        )
    for name, x in (("key_mask", key_mask), ("key_bias", key_bias)):
        if x is not None and x.device != q.device:
            raise DitAttnError(f"{name} is on {x.device} and q on {q.device}; move it")


def _check_terms(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: BlockLayout, terms: Terms) -> None:
    """Check that the optional terms fit the call.

    Raises:
        DitAttnError: a shape, a size or a combination; the message names the argument and the remedy.
    """
    sizes = {
        "B": q.shape[0], "H": q.shape[2], "Hk": k.shape[2], "Sq": q.shape[1], "Sk": k.shape[1],
        "D": v.shape[-1], "nq": layout.nq,
    }  # fmt: skip
    lengths, bias, comp, end = terms.key_lengths, terms.bias, terms.compensation, terms.epilogue
    for name in KINDS:  # the required fields of each term
        term, _, field = name.partition(".")
        if field and getattr(terms, term) is not None:
            check_kinds(**{name: getattr(getattr(terms, term), field)})
    for name, x in _tensors(terms):
        if x.device != q.device:
            raise DitAttnError(f"{name} is on {x.device} and q on {q.device}; move it")
        kind, fits = _DTYPES.get(name, ("a floating-point", torch.is_floating_point))
        if not fits(x):
            raise DitAttnError(f"{name} must be of {kind} dtype, got {dtype_name(x.dtype)}; cast it")
    if lengths is not None:
        _fits("key_lengths", lengths, ("B",), sizes)
    if bias is not None:
        if bias.q.shape[-1:] != bias.k.shape[-1:] or bias.q.shape[-1] < 1:
            raise DitAttnError(
                f"bias.q {tuple(bias.q.shape)} and bias.k {tuple(bias.k.shape)} must share their last size, at "
                "least 1; pad the shorter factor with zeros"
            )
        sizes["R"] = bias.q.shape[-1]
        _fits("bias.q", bias.q, ("B|1", "H|1", "Sq", "R"), sizes)
        _fits("bias.k", bias.k, ("B|1", "H|1", "Sk", "R"), sizes)
    if comp is not None:
        _number("compensation.cap", comp.cap)
        if not is_whole(comp.tokens, 1) or layout.kv_block % comp.tokens:
            raise DitAttnError(
                f"compensation.tokens must divide the layout's kv_block {layout.kv_block}, got {shorten(comp.tokens)}; "
                "pool again with a divisor"
            )
        if v.shape[-1] != q.shape[-1]:
            raise DitAttnError(f"compensation needs v's head size {v.shape[-1]} to equal q's {q.shape[-1]}; pad v")
        sizes["nv"] = ceil_div(k.shape[1], comp.tokens)
        for name in ("k", "v", "variance"):
            x = getattr(comp, name)
            if x is not None:
                _fits(f"compensation.{name}", x, ("B", "Hk", "nv", "D"), sizes)
        _fits("compensation.log_weight", comp.log_weight, ("B|1", "H|1", "nv"), sizes)
        if comp.left_out is not None:
            sizes["nk"] = layout.nk
            _fits("compensation.left_out", comp.left_out, ("B|1", "H|1", "nq", "nk"), sizes)
        if comp.first_order is not None:
            _fits("compensation.first_order", comp.first_order, ("B", "Hk", "D", "D"), sizes)
        if comp.bias is not None:
            if bias is None:
                raise DitAttnError("compensation.bias is the pooled keys' factor of a bias, and none is given; add it")
            _fits("compensation.bias", comp.bias, ("B|1", "H|1", "nv", "R"), sizes)
    if end is not None:
        _number("epilogue.cap", end.cap)
        shapes = {
            "row_scale": ("B|1", "H|1", "nq"), "lse_ref": ("B", "H", "Sq"), "add": ("B|1", "H|1", "nq", "D"),
            "blend": ("B|1", "H"),
        }  # fmt: skip
        for name, shape in shapes.items():
            x = getattr(end, name)
            if x is not None:
                _fits(f"epilogue.{name}", x, shape, sizes)
        if end.blend is not None and host_readable(end.blend) and not ((end.blend >= 0) & (end.blend <= 1)).all():
            raise DitAttnError("epilogue.blend must be in [0, 1], the weight of the query's own value; clamp it")
        shift = end.value_shift
        if end.blend is not None and not (is_whole(shift, 0) and shift <= k.shape[1] - q.shape[1]):
            raise DitAttnError(
                f"epilogue.value_shift {shorten(shift)} leaves no own value for some of {q.shape[1]} queries among "
                f"{k.shape[1]} keys; it is for self attention, give the first query's place among the keys"
            )


def _is_number(x: Any) -> bool:
    return isinstance(x, (int, float, np.integer, np.floating)) and not isinstance(x, bool)


def _number(name: str, x: Any) -> None:
    if not (_is_number(x) and x > -math.inf):  # NaN is not either
        raise DitAttnError(f"{name} must be a number, got {shorten(x)}; give a float, math.inf for no bound")


def _tensors(terms: Terms) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the terms with its name, such as ``bias.q``."""
    if terms.key_lengths is not None:
        yield "key_lengths", terms.key_lengths
    for name in ("bias", "compensation", "epilogue"):
        term = getattr(terms, name)
        for field in () if term is None else fields(term):
            x = getattr(term, field.name)
            if isinstance(x, torch.Tensor):
                yield f"{name}.{field.name}", x


def _fits(name: str, x: torch.Tensor, shape: tuple[str, ...], sizes: dict[str, int]) -> None:
    wanted = [{1, sizes[axis[:-2]]} if axis.endswith("|1") else {sizes[axis]} for axis in shape]
    if x.ndim != len(shape) or any(size not in allowed for size, allowed in zip(x.shape, wanted)):
        known = ", ".join(f"{axis.removesuffix('|1')}={sizes[axis.removesuffix('|1')]}" for axis in shape)
        raise DitAttnError(f"{name} must be ({', '.join(shape)}) with {known}, got {tuple(x.shape)}")
