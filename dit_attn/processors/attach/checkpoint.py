"""Gradient checkpointing: what is computed a second time takes the decisions of the first time.

Backward runs a block again when the session has moved on: to the end of the forward call, or to another one. The
function by which a model checkpoints its blocks is wrapped, so that each block carries the state it began with.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from dit_attn.errors import DitAttnError
from dit_attn.processors.attach.components import is_of_class
from dit_attn.processors.attach.session import Session
from dit_attn.processors.core.layer import Layer


class CheckpointHook:
    """Stands in for ``_gradient_checkpointing_func`` of a model or a part of it.

    Args:
        stock: the function that other code has set.
        session: the session, ``None`` in a model that comes back without methods.
    """

    def __init__(self, stock: Callable[..., Any], session: Session | None) -> None:
        self.stock, self.session = stock, session

    def __deepcopy__(self, memo: dict[int, Any]) -> CheckpointHook:
        return CheckpointHook(self.stock, copy.deepcopy(self.session, memo))

    def __reduce__(self) -> Any:
        return CheckpointHook, (self.stock, None)

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.session is None:
            return self.stock(function, *args, **kwargs)
        return self.stock(_Recomputable(function, self.session), *args, **kwargs)


def follow_checkpoints(session: Session) -> None:
    """Wrap the checkpointing functions of a session's transformer that are in use and not wrapped yet."""
    if not (torch.is_grad_enabled() and getattr(session.model, "gradient_checkpointing", False)):
        return
    for module in session.model.modules():
        stock = module.__dict__.get(_NAME)
        if stock is not None and not is_of_class(stock, CheckpointHook):
            module.__dict__[_NAME] = CheckpointHook(stock, session)


def unfollow_checkpoints(model: torch.nn.Module) -> None:
    """Restore the checkpointing functions of a transformer."""
    for module in model.modules():
        hook: Any = module.__dict__.get(_NAME)
        if is_of_class(hook, CheckpointHook):
            module.__dict__[_NAME] = hook.stock


def check_caller(session: Session) -> None:
    """Refuse an attention call that backward or another thread makes, unless it is one that a session can follow.

    Raises:
        DitAttnError: the block was checkpointed in another way than by ``enable_gradient_checkpointing``, or another
            thread is running the transformer.
    """
    in_backward = getattr(torch._C, "_current_graph_task_id", None)
    if session.methods and not session.recomputing and in_backward is not None and in_backward() != -1:
        raise DitAttnError(
            "dit_attn cannot follow this gradient checkpointing; use the model's enable_gradient_checkpointing(), or "
            "disable the method"
        )
    if session.methods and not session.recomputing:
        session.check_thread()


_NAME = "_gradient_checkpointing_func"


class _Recomputable:
    """A checkpointed block: the second call and those after it run in the state of the first."""

    def __init__(self, function: Callable[..., Any], session: Session) -> None:
        self.function, self.session = function, session
        self.snapshot: _Snapshot | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.snapshot is None:
            self.snapshot = _Snapshot(self.session, self._layers())
            return self.function(*args, **kwargs)
        with self.snapshot.restored():
            return self.function(*args, **kwargs)

    def _layers(self) -> list[Layer]:
        """The layers inside the block, all where it is a plain function."""
        if not isinstance(self.function, torch.nn.Module):
            return self.session.layers
        inside = set(self.function.modules())
        return [layer for layer in self.session.layers if self.session.module(layer) in inside]


class _Snapshot:
    """State of a session and some of its layers."""

    def __init__(self, session: Session, layers: list[Layer]) -> None:
        self.session = session
        self.run = {**vars(session), "clock": copy.copy(session.clock)}
        self.layers = [(layer, _layer_state(vars(layer))) for layer in layers]

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Go back to this state for the length of a ``with`` block; what happens there is not counted."""
        run, layers = dict(vars(self.session)), [dict(vars(layer)) for layer, _ in self.layers]
        vars(self.session).update(self.run, observers=[], recomputing=True)
        for layer, state in self.layers:
            vars(layer).update(_layer_state(state))
        try:
            yield
        finally:
            vars(self.session).update(run)
            for (layer, _), now in zip(self.layers, layers):
                vars(layer).update(now)


def _layer_state(state: dict[str, Any]) -> dict[str, Any]:
    """A layer's attributes, with statistics and stored values that can change without changing the layer's own."""
    return {**state, "stats": copy.deepcopy(state["stats"]), "_states": state["_states"].snapshot()}
