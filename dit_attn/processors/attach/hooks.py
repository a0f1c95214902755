"""Hooks on a transformer: its forward arguments, the pipeline's cache context, and the guidance behind its forward."""

from __future__ import annotations

import ast
import copy
import functools
import inspect
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch

from dit_attn.errors import DitAttnError
from dit_attn.processors.attach.checkpoint import follow_checkpoints
from dit_attn.processors.attach.components import COMPONENTS
from dit_attn.processors.attach.guider import PerturbedGuider
from dit_attn.processors.attach.learned import saved_files
from dit_attn.processors.attach.session import Session
from dit_attn.processors.core.parameters import CHILD
from dit_attn.processors.core.run_state import run_by_handle
from dit_attn.processors.methods import saved


class ForwardHook:
    """Forward pre-hook of the transformer: shows the session the arguments its family row names.

    Args:
        session: the session, ``None`` in a saved model that comes back without methods.
        rewrap: called before every forward; wraps processors that other code has replaced since.
    """

    def __init__(self, session: Session | None, rewrap: Callable[[Session], None] | None = None) -> None:
        self.session, self.rewrap = session, rewrap
        if session is None:
            return
        self.names = tuple(dict.fromkeys((session.family.timestep, "hidden_states", *session.family.forward_args)))
        parameters = list(inspect.signature(type(session.model).forward).parameters)[1:]
        self.positions = {name: parameters.index(name) for name in self.names if name in parameters}

    def __deepcopy__(self, memo: dict[int, Any]) -> ForwardHook:
        return ForwardHook(copy.deepcopy(self.session, memo), self.rewrap)

    def __reduce__(self) -> Any:
        return ForwardHook, (None,)  # a saved model comes back without methods

    def __call__(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.session is None:
            return None
        values: dict[str, Any] = {}
        for name, position in self.positions.items():
            values[name] = args[position] if position < len(args) else kwargs.get(name)
        values = self.session.family.shown(values)
        if torch.compiler.is_compiling():
            tensors = [value for value in values.values() if isinstance(value, torch.Tensor)]
            names = [name if isinstance(v, torch.Tensor) else f"{name}={v!r}" for name, v in values.items()]
            torch.ops.dit_attn.on_forward(self.session.handle, tensors, "\n".join(names))
            return None
        if self.rewrap is not None:
            self.rewrap(self.session)
        follow_checkpoints(self.session)
        self.session.on_forward(values)
        if not self.session.is_step:
            return None
        if self.session.twin is not None:
            self.session.twin.before(module, args, kwargs)
        if self.session.negative is not None:
            return self.session.negative.before(module, args, kwargs)
        return None if self.session.guider is None else self.session.guider.before(module, args, kwargs)


@torch.library.custom_op("dit_attn::on_forward", mutates_args=("run",))
def _on_forward(run: torch.Tensor, tensors: list[torch.Tensor], spec: str) -> None:
    """Forward hook of a compiled transformer: ``run`` names the session, the lines of ``spec`` the arguments.

    A line is the name of the next tensor, or ``name=literal`` for an argument that is no tensor.
    """
    rest, values = iter(tensors), {}
    for line in spec.splitlines():
        name, is_literal, text = line.partition("=")
        values[name] = ast.literal_eval(text) if is_literal else next(rest)
    session = cast(Session, run_by_handle(run))
    if session.twin is not None:
        raise DitAttnError(
            f"{session.twin.method.slug} runs a twin pass, which a compiled transformer cannot start; compile its "
            "blocks alone (compile_repeated_blocks), or do not compile"
        )
    if session.negative is not None:
        raise DitAttnError(
            f"{session.negative.method.slug} adds rows to the batch, which a compiled transformer cannot do; compile "
            "its blocks alone (compile_repeated_blocks), or do not compile"
        )
    session.on_forward(values)
    if session.reduced is not None and (session.reduced.rebuilt or len(session.reduced.kept) > 1):
        raise DitAttnError(
            "head-drop cannot change heads or weights inside a compiled transformer; enable it again after the weights "
            "have changed, or compile its blocks alone (compile_repeated_blocks)"
        )


@_on_forward.register_fake
def _(run: torch.Tensor, tensors: list[torch.Tensor], spec: str) -> None:
    return None


class _StandIn:
    """Stands in for a method of the transformer, in its instance dictionary."""

    def __init__(self, model: torch.nn.Module, session: Session | None) -> None:
        self._model, self.session = weakref.ref(model), session

    def __deepcopy__(self, memo: dict[int, Any]) -> _StandIn:
        return type(self)(memo[id(self._model())], copy.deepcopy(self.session, memo))

    def __reduce__(self) -> Any:
        return type(self), (self._model(), None)  # a saved model comes back without methods


class ContextHook(_StandIn):
    """Stands in for ``model.cache_context`` and stores what the pipeline says about the call."""

    @contextmanager
    def __call__(self, name: str, **kwargs: Any) -> Iterator[None]:
        model: Any = self._model()
        session = self.session or SimpleNamespace(context=None)
        outer = session.context
        session.context = SimpleNamespace(
            name=name, step_index=kwargs.get("step_index"), num_inference_steps=kwargs.get("num_inference_steps")
        )
        try:
            with type(model).cache_context(model, name, **kwargs):
                yield
        finally:
            session.context = outer


class SaveHook:
    """Stands in for ``model.save_pretrained``: a stock model's files, and next to them the methods that learn."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = weakref.ref(model)
        self.__signature__ = inspect.signature(type(model).save_pretrained.__get__(model))  # type: ignore[attr-defined]

    def __deepcopy__(self, memo: dict[int, Any]) -> SaveHook:
        return SaveHook(memo[id(self._model())])

    def __reduce__(self) -> Any:
        return SaveHook, (self._model(),)

    def __call__(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        model: Any = self._model()
        learned = model._modules.pop(CHILD, None)
        try:
            given = inspect.signature(self).bind(save_directory, *args, **kwargs)
            if learned is not None and learned.methods and given.arguments.get("is_main_process", True):
                for name, parts in saved_files({COMPONENTS[0]: learned}).items():
                    saved.write(Path(save_directory, name), name, parts)
            type(model).save_pretrained(model, save_directory, *args, **kwargs)
        finally:
            if learned is not None:
                model._modules[CHILD] = learned


class GuidanceHook:
    """Forward hook of the transformer that runs a session's guider."""

    def __init__(self, session: Session | None) -> None:
        self.session = session

    def __deepcopy__(self, memo: dict[int, Any]) -> GuidanceHook:
        return GuidanceHook(copy.deepcopy(self.session, memo))

    def __reduce__(self) -> Any:
        return GuidanceHook, (None,)  # a saved model comes back without methods

    def __call__(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if self.session is None or self.session.guider is None or self.session.guider.outside:
            return output
        return _uncompiled(self.session.guider, module, args, kwargs, output)


class TwinHook:
    """Forward hook of the transformer that ends what a session's twin pass replaced; also runs after an error."""

    def __init__(self, session: Session | None) -> None:
        self.session = session

    def __deepcopy__(self, memo: dict[int, Any]) -> TwinHook:
        return TwinHook(copy.deepcopy(self.session, memo))

    def __reduce__(self) -> Any:
        return TwinHook, (None,)  # a saved model comes back without methods

    def __call__(self, module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.session is not None and self.session.twin is not None:
            self.session.twin.release()


class NegativeHook:
    """Forward hook of the transformer that drops the rows which were appended for a negative prompt."""

    def __init__(self, session: Session | None) -> None:
        self.session = session

    def __deepcopy__(self, memo: dict[int, Any]) -> NegativeHook:
        return NegativeHook(copy.deepcopy(self.session, memo))

    def __reduce__(self) -> Any:
        return NegativeHook, (None,)  # a saved model comes back without methods

    def __call__(self, module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if self.session is None or self.session.negative is None:
            return output
        return self.session.negative.after(output)


class CompileHook(_StandIn):
    """Stands in for ``model.compile``, whose graph has no room for a second pass: guidance runs behind it."""

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        model: Any = self._model()
        type(model).compile(model, *args, **kwargs)
        if self.session is not None:
            guide_compiled(model, self.session)


class GuidedCall:
    """Stands in for the compiled call of a transformer, and runs a session's guider behind it.

    Args:
        forward: the compiled call.
        session: the session.
    """

    def __init__(self, forward: Callable[..., Any], session: Session) -> None:
        self.forward, self.session = forward, session

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output, guider = self.forward(*args, **kwargs), self.session.guider
        return output if guider is None else guider.after(self, args, kwargs, output)


def guide_compiled(model: torch.nn.Module, session: Session) -> None:
    """Run a session's guider behind a transformer that was compiled in place; nothing happens where it was not."""
    compiled = model._compiled_call_impl
    if session.guider is not None and compiled is not None:
        model._compiled_call_impl, session.guider.outside = GuidedCall(compiled, session), True


_REASON = "enable a guidance method after torch.compile(transformer), or compile in place: transformer.compile()"
_HAS_REASON = "reason" in inspect.signature(torch.compiler.disable).parameters  # since torch 2.7
_disable: Any = torch.compiler.disable


@functools.partial(_disable, **({"reason": _REASON} if _HAS_REASON else {}))
def _uncompiled(guider: PerturbedGuider, module: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    return guider.after(module, args, kwargs, output)
