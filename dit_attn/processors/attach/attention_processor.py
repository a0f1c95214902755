"""Subclass each layer's stock attention processor and intercept its attention call.

The subclass is made from the stock class: same signature (the models filter keyword arguments by it), same weights,
``isinstance`` unchanged. Its attention call is intercepted in one of two ways:

* ``dispatch``, processors that go through diffusers' ``dispatch_attention_fn``: ``_attention_backend`` becomes a
  property that returns our backend; what users write to it is stored as the backend of stock calls;
* ``torch``, processors that call ``torch.nn.functional.scaled_dot_product_attention``: a copy of their code that calls
  ours, or a ``TorchFunctionMode`` around them.

A processor with neither is refused. Inside ``torch.compile`` the call is an opaque operator, see
:mod:`dit_attn.processors.attach.intercepted_call`.
"""

from __future__ import annotations

import copy
import functools
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from dit_attn.errors import DitAttnError
from dit_attn.processors.attach import compat
from dit_attn.processors.attach.checkpoint import check_caller
from dit_attn.processors.attach.intercepted_call import (
    compiled_attention,
    dispatch_backend,
    session_by_handle,
    stock_torch,
)
from dit_attn.processors.attach.layer_shape import query_norm
from dit_attn.processors.attach.named_backend import count_unseen, is_unchanged, names_backend, redirected
from dit_attn.processors.attach.rotary import moved_arguments, moving_methods, rotary_parameters
from dit_attn.processors.attach.session import Session
from dit_attn.processors.attach.traced_call import copy_with_attention, same_as_copy
from dit_attn.processors.core.call import SDPAArgs
from dit_attn.processors.core.dispatch import dispatch_attention
from dit_attn.processors.core.layer import Layer, layer_by_id
from dit_attn.processors.methods.base import Method


class _Slot(threading.local):
    """The layer and the run that are active in this thread, by their handles, and the turn of its attention call."""

    def __init__(self) -> None:  # per thread; entries of the instance, since compiled graphs guard on their presence
        self.layer: torch.Tensor | None = None
        self.run: torch.Tensor | None = None
        self.turn = 0
        self.named: str | None = None  # backend that the attention call names, "" for the active one


_SLOT = _Slot()


def tap_of(processor: Any) -> str | None:
    """Return how a processor's attention call can be intercepted: ``"dispatch"``, ``"torch"``, or ``None``."""
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


def wrap_processor(processor: Any, run: Session, layer: Layer) -> Any:
    """Return a processor of the derived class for ``layer``, with the stock processor's state.

    Raises:
        DitAttnError: the processor has no softmax attention to tap.
    """
    if is_wrapped(processor):
        processor = unwrap_processor(processor)
    tap = tap_of(processor)
    if tap is None:
        raise DitAttnError(
            f"layer {layer.name} runs {type(processor).__name__}, which has no softmax attention to tap "
            "(linear attention?); remove the method or use another model"
        )
    stock_class: Any = type(processor)
    derived = _derive(stock_class, tap)
    clone: Any = object.__new__(derived)
    state = dict(processor.__dict__)
    clone.__dict__.update(state)
    clone.__dict__["_dit_dense_backend"] = state.pop("_attention_backend", None)
    clone.__dict__.pop("_attention_backend", None)
    clone.__dict__["_dit_layer"], clone.__dict__["_dit_run"] = layer, run
    clone.__dict__["_dit_stock"] = processor
    rotary = not run.resampled or bool(rotary_parameters(stock_class.__call__))
    clone.__dict__["_dit_moves"] = layer.kind == "self" and rotary and bool(moving_methods(run))
    methods = cast("tuple[Method, ...]", run.methods_for("self") if layer.kind == "self" else ())
    clone.__dict__["_dit_reads"] = any(method.reads_input for method in methods)
    clone.__dict__["_dit_queries"] = any(method.reads_queries for method in methods)
    return clone


def is_wrapped(processor: Any) -> bool:
    """Return whether ``processor`` is a wrapped one."""
    return getattr(type(processor), "_dit_tap", None) is not None


def wrapped_by(processor: Any) -> Session:
    """Return the session of a wrapped processor."""
    return cast(Session, processor.__dict__["_dit_run"])


def unwrap_processor(processor: Any) -> Any:
    """Return the stock processor behind ours, with what other code has written to ours since (backend, parallelism)."""
    stock = processor.__dict__["_dit_stock"]
    for name, value in processor.__dict__.items():
        if not name.startswith("_dit_"):
            stock.__dict__[name] = value
    if processor.__dict__["_dit_dense_backend"] is not None or "_attention_backend" in stock.__dict__:
        stock._attention_backend = processor.__dict__["_dit_dense_backend"]
    return stock


@functools.cache
def _derive(stock: type, tap: str) -> type:
    wrapped = _with_backend(stock.__call__) if tap == "dispatch" else _with_mode(stock.__call__)
    body: dict[str, Any] = {
        "__new__": lambda _, *args, **kwargs: stock(*args, **kwargs),  # `processor.__class__()`: IP-Adapter loaders
        "__call__": wrapped,
        "__deepcopy__": _deepcopy,
        "__reduce__": _reduce,
        "__module__": __name__,
        "__doc__": f"{stock.__name__} with a tap at its attention call.",
        "_dit_tap": tap,
        "_dit_rotary": rotary_parameters(stock.__call__),
        "_dit_moves": False,
        "_dit_reads": False,
        "_dit_queries": False,
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
    run = copy.deepcopy(self.__dict__["_dit_run"], memo)
    layer = next(layer for layer in run.layers if layer.name == self.__dict__["_dit_layer"].name)
    clone = wrap_processor(copy.deepcopy(unwrap_processor(self), memo), run, layer)
    memo[id(self)] = clone
    return clone


def _reduce(self: Any) -> Any:
    return copy.copy, (unwrap_processor(self),)


def _is_stray(processor: Any, attn: Any) -> bool:
    """Whether other code stored the processor and set it again: after ``disable``, or on another module."""
    run: Session = processor._dit_run
    return run.detached or run.module(processor._dit_layer) is not attn


def _needs_input(self: Any) -> bool:
    """Whether a method is yet to be shown the layer's input; compiled graphs hide it."""
    return self._dit_reads and not torch.compiler.is_compiling() and self._dit_layer.inputs is None


@contextmanager
def _shown_input(processor: Any, attn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
    """Keep what a processor gets, and the queries that it normalizes, with its layer for the length of the call."""
    layer: Layer = processor._dit_layer
    layer.inputs = args[0] if args else kwargs.get("hidden_states")
    norm, layer.normalizes_queries = query_norm(attn) if processor._dit_queries else (None, True)

    def keep(module: Any, given: tuple[Any, ...]) -> None:
        if given and layer.raw_queries is None:
            layer.raw_queries = given[0]

    handle = None if norm is None else norm.register_forward_pre_hook(keep)
    try:
        yield
    finally:
        layer.inputs = layer.raw_queries = None
        if handle is not None:
            handle.remove()


def _with_backend(stock_call: Callable[..., Any]) -> Callable[..., Any]:
    """The call of a processor that gets our backend, or of its copy where it names one itself."""
    copied = redirected(stock_call, _backend, _name_backend) if names_backend(stock_call) else None
    if copied is None:
        return _with_slot(stock_call)
    unchanged, stock, redirect = is_unchanged(stock_call), _with_slot(stock_call), _with_slot(copied)

    @functools.wraps(stock_call)
    def __call__(self: Any, attn: Any, *args: Any, **kwargs: Any) -> Any:
        run = redirect if torch.compiler.is_compiling() or unchanged() else stock
        return run(self, attn, *args, **kwargs)

    return __call__


def _name_backend(name: str | None) -> None:
    _SLOT.named = name


def _with_slot(stock_call: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(stock_call)
    def __call__(self: Any, attn: Any, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling() and _is_stray(self, attn):
            return unwrap_processor(self)(attn, *args, **kwargs)
        if _needs_input(self):
            with _shown_input(self, attn, args, kwargs):
                return __call__(self, attn, *args, **kwargs)
        if self._dit_moves:
            args, kwargs = moved_arguments(self._dit_run, self._dit_layer, self._dit_rotary, args, kwargs)
        if self._dit_layer.reduced is not None:
            attn = self._dit_layer.reduced
        before = (_SLOT.layer, _SLOT.run, _SLOT.turn)
        _SLOT.layer, _SLOT.run, _SLOT.turn = self._dit_layer.handle, self._dit_run.handle, 0
        try:
            out = stock_call(self, attn, *args, **kwargs)
            if not torch.compiler.is_compiling() and _SLOT.turn == 0:
                count_unseen(self._dit_layer)
            return out
        finally:
            _SLOT.layer, _SLOT.run, _SLOT.turn = before

    return __call__


def _with_mode(stock_call: Callable[..., Any]) -> Callable[..., Any]:
    traced = copy_with_attention(stock_call, _traced_sdpa, compat.dispatchers(_backend))
    in_slot = None if traced is None else _with_slot(traced)
    same = None if traced is None else same_as_copy(stock_call)

    @functools.wraps(stock_call)
    def __call__(self: Any, attn: Any, *args: Any, **kwargs: Any) -> Any:
        if in_slot is not None and (torch.compiler.is_compiling() or (same is not None and same())):
            return in_slot(self, attn, *args, **kwargs)
        if not torch.compiler.is_compiling() and _is_stray(self, attn):
            return unwrap_processor(self)(attn, *args, **kwargs)
        if _needs_input(self):
            with _shown_input(self, attn, args, kwargs):
                return __call__(self, attn, *args, **kwargs)
        if self._dit_moves:
            args, kwargs = moved_arguments(self._dit_run, self._dit_layer, self._dit_rotary, args, kwargs)
        if self._dit_layer.reduced is not None:
            attn = self._dit_layer.reduced
        with _TorchTap(self._dit_run, self._dit_layer) as tap:
            out = stock_call(self, attn, *args, **kwargs)
        if tap.turn == 0:
            count_unseen(self._dit_layer)
        return out

    return __call__


_SDPA = torch._C._nn.scaled_dot_product_attention  # what other code that has replaced F's may call


class _TorchTap(TorchFunctionMode):
    """Intercept ``scaled_dot_product_attention`` of (B, H, S, D) tensors; (B, S, H, D) is handed on."""

    def __init__(self, run: Session, layer: Layer) -> None:
        super().__init__()
        self.run, self.layer, self.turn = run, layer, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention and func is not _SDPA:
            return func(*args, **kwargs)
        turn, self.turn = self.turn, self.turn + 1
        return _on_sdpa(self.run, self.layer, turn, func, *args, **kwargs)


def _on_sdpa(
    run: Session,
    layer: Layer,
    turn: int,
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
    """Torch's own signature: the attention call of a processor that calls torch directly."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    args = SDPAArgs(q, k, v, attn_mask, scale, is_causal, dropout_p, enable_gqa, turn=turn)
    if torch.compiler.is_compiling():
        out = compiled_attention(layer.handle, run.handle, args, parallel=False)
    else:
        check_caller(run)
        out = dispatch_attention(run, layer, args, functools.partial(stock_torch, func))
    return out.transpose(1, 2)


def _traced_sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Torch's own signature: the attention call of the copy of such a processor."""
    layer, run = _SLOT.layer, _SLOT.run
    assert layer is not None and run is not None
    turn = _SLOT.turn
    _SLOT.turn += 1
    if not torch.compiler.is_compiling():
        here = session_by_handle(run), layer_by_id(int(layer)), turn, F.scaled_dot_product_attention
        return _on_sdpa(*here, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    args = SDPAArgs(q, k, v, attn_mask, scale, is_causal, dropout_p, enable_gqa, turn=turn)
    return compiled_attention(layer, run, args, parallel=False).transpose(1, 2)


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
    """Attention backend that our processors name to diffusers; q, k, v and the result are (B, S, H, D)."""
    layer, run = _SLOT.layer, _SLOT.run
    if layer is None or run is None:
        raise RuntimeError("the dit_attn attention backend was called outside a wrapped attention layer")
    args = SDPAArgs(query, key, value, attn_mask, scale, is_causal, dropout_p, enable_gqa, turn=_SLOT.turn)
    _SLOT.turn += 1
    if torch.compiler.is_compiling():
        return compiled_attention(layer, run, args, _parallel_config is not None, _SLOT.named)
    session = session_by_handle(run)
    check_caller(session)
    return dispatch_backend(session, layer_by_id(int(layer)), args, _parallel_config, _SLOT.named)
