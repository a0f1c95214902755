"""The socket: each attention layer keeps its stock processor's class through a derived one that can be asked first.

The derived class is made from the stock class, not written: same signature (the models filter keyword arguments by it),
same weights, ``isinstance`` unchanged. Its attention call is met at one of two taps:

* tap A, processors that go through diffusers' ``dispatch_attention_fn``: ``_attention_backend`` becomes a property that
  answers with our backend; what users write to it is kept as the backend for declined calls;
* tap B, processors that call ``torch.nn.functional.scaled_dot_product_attention``: a ``TorchFunctionMode`` around them.

A processor with neither is refused. Inside ``torch.compile`` both layers and decisions hide behind one opaque operator
whose layer is a 0-d tensor, so that all layers share a graph and nothing recompiles when step or method changes.
"""

from __future__ import annotations

import copy
import functools
import threading
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from dit_attn.errors import DitAttnError
from dit_attn.processors import compat
from dit_attn.processors.engage import answer
from dit_attn.processors.session import Site, site_by_id


class _Slot(threading.local):
    """The layer that is running in this thread."""

    def __init__(self) -> None:  # per thread; entries of the instance, since compiled graphs guard on their presence
        self.site: torch.Tensor | None = None
        self.clock: torch.Tensor | None = None


_SLOT = _Slot()


def tap_of(processor: Any) -> str | None:
    """``"dispatch"`` (tap A), ``"torch"`` (tap B) or ``None`` for a processor without softmax attention."""
    names = _called_names(type(processor).__call__)
    if "dispatch_attention_fn" in names and "_attention_backend" in names:
        return "dispatch"
    return "torch" if {"dispatch_attention_fn", "scaled_dot_product_attention"} & names else None


def _called_names(function: Any) -> set[str]:
    """Names a function's code mentions, and those of the helpers of its module that it calls."""
    function = getattr(function, "__wrapped__", function)
    if not isinstance(function, types.FunctionType):
        return set()
    names = set(function.__code__.co_names)
    for name in list(names):
        helper = function.__globals__.get(name)
        if isinstance(helper, types.FunctionType) and helper.__module__ == function.__module__:
            names |= set(helper.__code__.co_names)
    return names


def socketed(processor: Any, site: Site) -> Any:
    """A processor of the derived class for ``site``, carrying the stock processor's state.

    Raises:
        DitAttnError: the processor has no softmax attention to tap.
    """
    if is_socketed(processor):
        processor = unsocketed(processor)
    tap = tap_of(processor)
    if tap is None:
        raise DitAttnError(
            f"layer {site.name} runs {type(processor).__name__}, which has no softmax attention to tap "
            "(linear attention?); remove the method or use another model"
        )
    stock_class: Any = type(processor)
    derived = _derive(stock_class, tap)
    clone: Any = object.__new__(derived)
    state = dict(processor.__dict__)
    clone.__dict__.update(state)
    clone.__dict__["_dit_dense_backend"] = state.pop("_attention_backend", None)
    clone.__dict__.pop("_attention_backend", None)
    clone.__dict__["_dit_site"] = site
    clone.__dict__["_dit_stock"] = processor
    return clone


def is_socketed(processor: Any) -> bool:
    """Whether ``processor`` is one of ours."""
    return getattr(type(processor), "_dit_tap", None) is not None


def unsocketed(processor: Any) -> Any:
    """The stock processor behind ours, with what other code has written to ours since (backend, parallel settings)."""
    stock = processor.__dict__["_dit_stock"]
    for name, value in processor.__dict__.items():
        if not name.startswith("_dit_"):
            stock.__dict__[name] = value
    if processor.__dict__["_dit_dense_backend"] is not None or "_attention_backend" in stock.__dict__:
        stock._attention_backend = processor.__dict__["_dit_dense_backend"]
    return stock


@functools.cache
def _derive(stock: type, tap: str) -> type:
    wrapped = _with_slot(stock.__call__) if tap == "dispatch" else _with_mode(stock.__call__)
    body: dict[str, Any] = {
        "__call__": wrapped,
        "__deepcopy__": _deepcopy,
        "__reduce__": _reduce,
        "__module__": __name__,
        "__doc__": f"{stock.__name__} with a tap at its attention call.",
        "_dit_tap": tap,
    }
    if tap == "dispatch":
        body["_dit_backend"] = compat.register_backend(_backend)  # read in compiled code: an attribute, not a call
        body["_attention_backend"] = property(_read_backend, _write_backend)
    derived = type(f"DitAttn{stock.__name__}", (stock,), body)
    compat.copy_registry_entry(stock, derived)
    return derived


def _read_backend(self: Any) -> Any:
    return self._dit_backend


def _write_backend(self: Any, value: Any) -> None:
    self.__dict__["_dit_dense_backend"] = value


def _deepcopy(self: Any, memo: dict[int, Any]) -> Any:
    site = copy.deepcopy(self.__dict__["_dit_site"], memo)
    clone = socketed(copy.deepcopy(unsocketed(self), memo), site)
    memo[id(self)] = clone
    return clone


def _reduce(self: Any) -> Any:
    return copy.copy, (unsocketed(self),)


def _with_slot(stock_call: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(stock_call)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        site, before = self._dit_site, (_SLOT.site, _SLOT.clock)
        _SLOT.site, _SLOT.clock = site.token, site.session.token
        try:
            return stock_call(self, *args, **kwargs)
        finally:
            _SLOT.site, _SLOT.clock = before

    return __call__


def _with_mode(stock_call: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(stock_call)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _TorchTap(self._dit_site):
            return stock_call(self, *args, **kwargs)

    return __call__


class _TorchTap(TorchFunctionMode):
    """Tap B: sees (B, H, S, D) tensors, hands (B, S, H, D) on."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.site = site

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        return _sdpa(self.site, func, *args, **kwargs)


def _sdpa(
    site: Site,
    func: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    def stock() -> torch.Tensor:
        # The very call the processor made, so that declined calls stay bit-equal on every torch.
        extra = {"enable_gqa": True} if enable_gqa else {}
        out = func(
            query, key, value, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale, **extra
        )
        return out.transpose(1, 2)

    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    if torch.compiler.is_compiling():
        out = _attend_compiled(site.token, site.session.token, q, k, v, attn_mask, scale, is_causal, enable_gqa, False)
    else:
        out = answer(site, q, k, v, attn_mask, scale, is_causal, dropout_p, stock)
    return out.transpose(1, 2)


def _backend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    _parallel_config: Any = None,
) -> torch.Tensor:
    """Tap A: the backend our processors name; q, k, v and the result are (B, S, H, D)."""
    token, clock = _SLOT.site, _SLOT.clock
    if token is None or clock is None:
        raise RuntimeError("the dit_attn attention backend was called outside a socketed attention layer")
    if torch.compiler.is_compiling():
        parallel = _parallel_config is not None
        return _attend_compiled(token, clock, query, key, value, attn_mask, scale, is_causal, enable_gqa, parallel)
    site = site_by_id(int(token))
    stock = functools.partial(
        _stock_dispatch, site, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, _parallel_config
    )
    return answer(site, query, key, value, attn_mask, scale, is_causal, dropout_p, stock, _parallel_config)


def _stock_dispatch(
    site: Site,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    parallel_config: Any,
) -> torch.Tensor:
    processor = site.session.model.get_submodule(site.name).processor
    return compat.dispatch(
        query,
        key,
        value,
        backend=processor.__dict__["_dit_dense_backend"],
        parallel_config=parallel_config,
        attn_mask=attn_mask,
        dropout_p=dropout_p,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
    )


def _attend_compiled(
    site: torch.Tensor,
    clock: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
    causal: bool,
    gqa: bool,
    parallel: bool,
) -> torch.Tensor:
    training = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if training:  # an error raised while tracing would be buried in Dynamo's own: the operator raises when it runs
        q, k, v = q.detach(), k.detach(), v.detach()
    return torch.ops.dit_attn.attend(site, clock, q, k, v, mask, scale, causal, gqa, parallel, training)


@torch.library.custom_op("dit_attn::attend", mutates_args=())
def _attend(
    site: torch.Tensor,
    clock: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
    causal: bool,
    gqa: bool,
    parallel: bool,
    training: bool,
) -> torch.Tensor:
    """One attention call of a compiled model; q, k, v and the result are (B, S, H, D).

    ``clock`` is not read: it orders the call after the observation of the forward arguments.
    """
    if training:
        raise DitAttnError(
            "dit_attn methods cannot be trained inside torch.compile; train without compiling, or disable the method"
        )
    here = site_by_id(int(site))
    processor: Any = here.session.model.get_submodule(here.name).processor
    config = processor._parallel_config if parallel else None
    if type(processor)._dit_tap == "dispatch":
        stock = functools.partial(_stock_dispatch, here, q, k, v, mask, 0.0, causal, scale, gqa, config)
    else:
        stock = functools.partial(_stock_torch, q, k, v, mask, causal, scale, gqa)
    return answer(here, q, k, v, mask, scale, causal, 0.0, stock, config).contiguous()


@_attend.register_fake
def _(
    site: torch.Tensor,
    clock: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
    causal: bool,
    gqa: bool,
    parallel: bool,
    training: bool,
) -> torch.Tensor:
    return q.new_empty(*q.shape[:-1], v.shape[-1])


def _stock_torch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    causal: bool,
    scale: float | None,
    gqa: bool,
) -> torch.Tensor:
    extra = {"enable_gqa": True} if gqa else {}
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale, **extra).transpose(
        1, 2
    )
