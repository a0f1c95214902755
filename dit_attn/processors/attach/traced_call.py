"""A copy of an attention processor's code that calls another function for ``F.scaled_dot_product_attention``.

A ``TorchFunctionMode`` intercepts that call whatever the code. Under one, ``torch.compile`` also traces the Python
methods of tensors, such as ``unflatten``, and fails there; in eager code every operation of a processor takes a detour
through Python. The copy needs no mode: compiled code always runs it, eager code where it is known to do the same.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F

_ATTENTION = F.scaled_dot_product_attention.__name__


def copy_with_attention(
    function: Callable[..., Any], attention: Callable[..., Any], others: Mapping[Any, Callable[..., Any]] | None = None
) -> Callable[..., Any] | None:
    """Return a copy of ``function``, and of the helpers of its module, that calls ``attention``.

    Args:
        function: a processor's ``__call__``.
        attention: takes the arguments of ``F.scaled_dot_product_attention``.
        others: what is called in the place of other functions, by these.

    Returns:
        The copy; ``None`` where the code finds the attention in another way than by a global name.
    """
    function = getattr(function, "__wrapped__", function)
    if not isinstance(function, types.FunctionType):
        return None
    replaced = types.ModuleType("functional")
    vars(replaced).update({**vars(F), "scaled_dot_product_attention": attention})
    other = {id(F): replaced, id(F.scaled_dot_product_attention): attention}
    other.update({id(stock): ours for stock, ours in (others or {}).items()})
    names = {name: other[id(value)] for name, value in function.__globals__.items() if id(value) in other}
    if not names:
        return None
    # Without a name, which Dynamo would look the globals up by: it finds them in the dictionary instead.
    scope = {**function.__globals__, **names}
    scope.pop("__name__", None)
    for name in function.__code__.co_names:
        helper = function.__globals__.get(name)
        if not isinstance(helper, types.FunctionType) or name in names:
            continue
        if helper.__module__ == function.__module__:
            scope[name] = _copy(helper, scope)
    return _copy(function, scope)


def same_as_copy(function: Callable[..., Any]) -> Callable[[], bool] | None:
    """Return a test of whether a copy of ``function`` still does what the function does; ``None`` for unknown code.

    Code is known where it is a processor's of diffusers that calls ``F.scaled_dot_product_attention`` itself, and by no
    other way. The copy is made of the global names at that time: once other code has replaced any, except for the
    attention, which it does not call, it is another one.
    """
    if not isinstance(function, types.FunctionType) or not function.__module__.startswith("diffusers."):
        return None
    names = names_in(function.__code__)
    if hasattr(function, "__wrapped__") or _ATTENTION not in names:
        return None
    helpers = [value for name in names if isinstance(value := function.__globals__.get(name), types.FunctionType)]
    others = [names_in(helper.__code__) for helper in helpers if helper.__module__ == function.__module__]
    used = names.union(*others) - {_ATTENTION}
    if names & {"dispatch_attention_fn", "functional", "super"} or any(_ATTENTION in other for other in others):
        return None
    copied = [(space, name, space[name]) for space in (function.__globals__, vars(F)) for name in used if name in space]
    return lambda: all(space.get(name) is value for space, name, value in copied)


def names_in(code: types.CodeType) -> set[str]:
    """Global names and attributes that code mentions, with those of the functions inside it."""
    inner = [names_in(value) for value in code.co_consts if isinstance(value, types.CodeType)]
    return set(code.co_names).union(*inner)


def _copy(function: types.FunctionType, scope: dict[str, Any]) -> types.FunctionType:
    copy = types.FunctionType(function.__code__, scope, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
