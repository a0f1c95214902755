"""Let a denoising loop say what its next transformer calls are."""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, WeakMethod

import torch

from dit_attn.errors import DitAttnError, shorten, unknown
from dit_attn.processors.attach.families import family_of
from dit_attn.processors.core.clock import RunPosition


@dataclass(frozen=True)
class _Declared:
    position: RunPosition
    thread: int
    prompts: Mapping[str, Any] | None = None


_DECLARED: WeakKeyDictionary[torch.nn.Module, _Declared] = WeakKeyDictionary()  # by model: sessions come and go
_ABORTED: WeakKeyDictionary[torch.nn.Module, int] = WeakKeyDictionary()


_ON_ABORT: WeakKeyDictionary[torch.nn.Module, WeakMethod[Callable[[], None]]] = WeakKeyDictionary()


def on_abort(model: torch.nn.Module, method: Callable[[], None]) -> None:
    """Call a bound method, which is not kept alive, when a ``run_context`` of ``model`` is left by an exception."""
    _ON_ABORT[model] = WeakMethod(method)


@contextmanager
def declare(
    models: Sequence[torch.nn.Module],
    step: int | None,
    steps: int | None,
    branch: str | Sequence[str] | None,
    window: int | Sequence[int] | None,
    prompt: str | Sequence[str] | Mapping[str, Any] | None = None,
) -> Iterator[None]:
    """Say what the calls of some transformers are; arguments as for :func:`dit_attn.run_context`."""
    before = {model: _DECLARED.get(model) for model in models}
    new = {model: _merged(model, outer, step, steps, branch, window) for model, outer in before.items()}
    for model, position in new.items():
        outer = before[model]
        inherited = outer.prompts if outer is not None else None
        prompts = inherited if prompt is None else _prompts(prompt)
        _DECLARED[model] = _Declared(position, threading.get_ident(), prompts)
    try:
        yield
    except BaseException:
        _ABORTED.update({model: aborted(model) + 1 for model in models})
        for method in [_ON_ABORT[model]() for model in models if model in _ON_ABORT]:
            if method is not None:
                method()
        raise
    finally:
        for model, outer in before.items():
            if outer is None:
                _DECLARED.pop(model, None)
            else:
                _DECLARED[model] = outer


def declared_position(model: torch.nn.Module) -> RunPosition | None:
    """Return what the code around a transformer call says of it, ``None`` outside every ``run_context``.

    Raises:
        DitAttnError: another thread is inside a ``run_context`` of this transformer.
    """
    declared = _DECLARED.get(model)
    if declared is None:
        return None
    _check_thread(declared)
    return declared.position


def declared_prompts(model: torch.nn.Module) -> Mapping[str, Any] | None:
    """Return the prompts that the code around a transformer call gave, as arguments of a pipeline's call."""
    declared = _DECLARED.get(model)
    return declared.prompts if declared is not None else None


def aborted(model: torch.nn.Module) -> int:
    """Return how often a ``run_context`` of a transformer was left by an exception; its run is over then."""
    return _ABORTED.get(model, 0)


def _merged(
    model: torch.nn.Module,
    outer: _Declared | None,
    step: int | None,
    steps: int | None,
    branch: str | Sequence[str] | None,
    window: int | Sequence[int] | None,
) -> RunPosition:
    """Return the position of a context inside ``outer``, which says what is not given.

    Raises:
        DitAttnError: a field out of range or missing, or another thread is inside a context.
    """
    if outer is not None:
        _check_thread(outer)
        step = outer.position.step if step is None else step
        steps = outer.position.steps if steps is None else steps
    step, steps = _whole("step", step, 0), _whole("steps", steps, 1)
    if step >= steps:
        raise DitAttnError(f"run_context: step must be under steps (it counts from 0), got step={step}, steps={steps}")
    inherited = outer.position if outer is not None else RunPosition(step, steps)
    return RunPosition(
        step,
        steps,
        inherited.branch if branch is None else _branches(model, branch),
        inherited.window if window is None else _window(window),
    )


def _whole(name: str, value: object, least: int) -> int:
    if value is None:
        raise DitAttnError(f"run_context: {name} is missing; give step= (from 0) and steps=")
    number = _index(value)
    if number is None or number < least:
        raise DitAttnError(f"run_context: {name} must be a whole number of at least {least}, got {shorten(value)}")
    return number


def _branches(model: torch.nn.Module, branch: object) -> tuple[str, ...]:
    names = (branch,) if isinstance(branch, str) else branch
    if not isinstance(names, (tuple, list)) or not names or not all(isinstance(name, str) for name in names):
        raise DitAttnError(
            f"run_context: branch must be a name or the names that the batch stacks, in order, got {shorten(branch)}"
        )
    rule = family_of(model, ()).cfg
    allowed = tuple(dict.fromkeys(("cond", "uncond", "perturbed", *rule.order, *rule.longer)))
    for name in names:
        if name not in allowed:
            raise unknown("branch", name, allowed)
    return tuple(names)


def _prompts(prompt: object) -> Mapping[str, Any]:
    given = prompt if isinstance(prompt, Mapping) else {"prompt": prompt}
    text = given.get("prompt")
    rows = [text] if isinstance(text, str) else text
    if not isinstance(rows, (list, tuple)) or not rows or not all(isinstance(row, str) for row in rows):
        raise DitAttnError(
            "run_context: prompt must be a text, a list of texts, or arguments of the pipeline's call with a prompt "
            f"among them, got {shorten(prompt)}"
        )
    return given


def _window(window: object) -> Hashable:
    numbers = [_index(n) for n in (window if isinstance(window, (tuple, list)) else (window,))]
    if not numbers or any(number is None or number < 0 for number in numbers):
        raise DitAttnError(f"run_context: window must be an index or a tuple of indices, from 0, got {shorten(window)}")
    return tuple(numbers)


def _index(value: Any) -> int | None:
    """The whole number that ``value`` is, ``None`` if it is none."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def _check_thread(declared: _Declared) -> None:
    if declared.thread != threading.get_ident():
        raise DitAttnError(
            "run_context: another thread is inside a run_context of this transformer; give each thread its own copy "
            "of the transformer, or run them in turns"
        )
