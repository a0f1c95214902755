"""A copy of an attention processor's code that calls another function for ``F.scaled_dot_product_attention``.

In eager code a ``TorchFunctionMode`` intercepts that call. Under one, ``torch.compile`` also traces the Python methods
of tensors, such as ``unflatten``, and fails there; the copy needs no mode.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F


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


def _copy(function: types.FunctionType, scope: dict[str, Any]) -> types.FunctionType:
    copy = types.FunctionType(function.__code__, scope, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
