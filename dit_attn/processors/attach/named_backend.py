"""Processors that name the attention backend of a call themselves, and so pass over ``_attention_backend``.

A copy of such a processor's code calls a dispatcher of ours, which remembers the name for stock attention. Calls that
no copy can catch are counted as fallbacks: none goes unseen in silence.
"""

from __future__ import annotations

import ast
import dis
import inspect
import textwrap
import types
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F

from dit_attn.processors.attach import compat
from dit_attn.processors.attach.traced_call import copy_with_attention, names_in
from dit_attn.processors.core.layer import Layer

DISPATCHER = "dispatch_attention_fn"
UNSEEN = "its processor names an attention backend itself, which cannot be intercepted"


def count_unseen(layer: Layer) -> None:
    """Count a call of a layer's processor in which no attention call was seen."""
    layer.stats.calls += 1
    layer.stats.fallbacks[UNSEEN] += 1


def names_backend(function: Callable[..., Any]) -> bool:
    """Return whether a processor's code, or a helper of its module, names the backend of an attention call."""
    function = getattr(function, "__wrapped__", function)
    return isinstance(function, types.FunctionType) and any(map(_has_named_call, [function, *_helpers(function)]))


def redirected(function: Callable[..., Any], attention: Callable[..., Any], name: Callable[..., Any]) -> Any:
    """Return a copy of a processor's code whose attention calls all reach ``attention``, a backend.

    Args:
        function: its ``__call__``.
        attention: the backend.
        name: see :func:`~dit_attn.processors.attach.compat.dispatchers`.

    Returns:
        The copy; ``None`` where the code cannot be copied.
    """
    if not isinstance(function, types.FunctionType) or hasattr(function, "__wrapped__") or _writes_globals(function):
        return None
    return copy_with_attention(function, F.scaled_dot_product_attention, compat.dispatchers(attention, name))


def is_unchanged(function: Any) -> Callable[[], bool]:
    """Return a test of whether the global names of a function's code are what they are now."""
    space = function.__globals__
    used = set().union(*(names_in(one.__code__) for one in (function, *_helpers(function))))
    before = [(name, space[name]) for name in used if name in space]
    return lambda: all(space.get(name) is value for name, value in before)


def _helpers(function: types.FunctionType) -> list[types.FunctionType]:
    """The functions of its module that a function calls by name."""
    found = (function.__globals__.get(name) for name in function.__code__.co_names)
    return [one for one in found if isinstance(one, types.FunctionType) and one.__module__ == function.__module__]


def _has_named_call(function: types.FunctionType) -> bool:
    if DISPATCHER not in names_in(function.__code__):
        return False
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return True  # code without a source may
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and _called(node) == DISPATCHER]
    return any(_is_named(call) for call in calls)


def _called(call: ast.Call) -> str:
    return getattr(call.func, "id", getattr(call.func, "attr", ""))


def _is_named(call: ast.Call) -> bool:
    """Whether the backend of a call is neither the processor's ``_attention_backend`` nor one that is passed on."""
    backend = next((keyword.value for keyword in call.keywords if keyword.arg == "backend"), None)
    if isinstance(backend, ast.Attribute):
        return backend.attr != "_attention_backend"
    return not isinstance(backend, ast.Name)


def _writes_globals(function: types.FunctionType) -> bool:
    """Whether code has global names of its own to write: a copy would write its own."""
    steps = (step for one in (function, *_helpers(function)) for step in dis.get_instructions(one))
    return any(step.opname == "STORE_GLOBAL" for step in steps)
