"""The settings of a dataclass: declared with help, range and choices, and checked once, where it is made.

Nothing heavy is imported here, so that the command line can check settings before torch is imported.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import numbers
import types
import typing
from collections.abc import Mapping
from typing import Any

from dit_attn.errors import DitAttnError, shorten, unknown

_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "none"}


def setting(default: Any, help: str, *, low: float | None = None, high: float | None = None, **extra: Any) -> Any:
    """Declare a field of a method with its help text and its inclusive numeric range.

    Args:
        default: default value (immutable).
        help: one line for documentation and the command line.
        low: smallest allowed value.
        high: largest allowed value.
        extra: further metadata, e.g. ``choices=(...)``, or ``unset=0.25``: the value of a field that is not given,
            or ``example=[8, 8]``: what the example of the method's page on the command line sets.
    """
    metadata = {"help": help, "low": low, "high": high, **extra}
    return dataclasses.field(default=default, metadata=metadata)


def check_fields(method: Any) -> None:
    """Convert every setting to its type (a list becomes a tuple) and refuse values that do not fit.

    Raises:
        DitAttnError: a value of another type, out of range, or not one of the choices.
    """
    cls: Any = type(method)
    hints = _hints(cls)
    for spec in dataclasses.fields(method):
        name, value = f"{method.slug}.{spec.name}", getattr(method, spec.name)
        try:
            fitted = _fit(value, hints[spec.name])
        except ValueError as error:
            kinds = describe(hints[spec.name])
            raise DitAttnError(
                f"{name} must be {kinds}{_bounds(spec, ' ')}, got {shorten(value)}: {_help(spec)}"
            ) from error
        if fitted is not value:
            object.__setattr__(method, spec.name, fitted)
        if fitted is not None:
            _check_range(name, spec, fitted, hints[spec.name])


def check_names(cls: Any, args: tuple[Any, ...], settings: Mapping[str, Any]) -> None:
    """Refuse keywords that are no settings, and of a method with a name settings that are no keywords.

    Args:
        cls: the class of the method.
        args: positional arguments of its constructor.
        settings: keywords of its constructor.

    Raises:
        DitAttnError: a positional argument, or an unknown setting.
    """
    names = [spec.name for spec in dataclasses.fields(cls) if spec.init]
    if args and cls.slug:
        raise DitAttnError(f"settings are keywords: {cls.__name__}({_as_keyword(cls, args[0])})")
    for name in settings:
        if name not in names:
            raise unknown(f"setting of {cls.slug or cls.__name__}", name, names)


def _as_keyword(cls: Any, value: Any) -> str:
    """``name=value`` with the first setting that takes the value, of the class before those of its bases."""
    own = inspect.get_annotations(cls)
    specs = sorted((spec for spec in dataclasses.fields(cls) if spec.init), key=lambda spec: spec.name not in own)
    for spec in specs:
        hint = _hints(cls)[spec.name]
        try:
            _check_range(spec.name, spec, _fit(value, hint), hint)
        except ValueError:  # of another type, or out of its range
            continue
        return f"{spec.name}={shorten(value)}"
    return ", ".join(f"{spec.name}=..." for spec in specs[:1])


def union_of(hint: Any) -> tuple[Any, ...]:
    """Return the types a hint allows, one where it is no union."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if union else (hint,)


def describe(hint: Any) -> str:
    """Describe a type in words, for messages."""
    kinds = union_of(hint)
    if set(kinds) & set(_NAMES) - {type(None)}:  # a list behind what is not one: "or none" is not of its items then
        kinds = tuple(sorted(kinds, key=lambda kind: typing.get_origin(kind) is tuple))
    return " or ".join(map(_describe_one, kinds))


def _describe_one(kind: Any) -> str:
    if typing.get_origin(kind) is tuple:
        return f"a list (a,b,...), each item {describe(typing.get_args(kind)[0])}"
    if typing.get_origin(kind) is typing.Literal:
        return f"one of {', '.join(map(str, typing.get_args(kind)))}"
    return _NAMES.get(kind, "a JSON object" if typing.get_origin(kind) is dict else str(kind))


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _fit(value: Any, hint: Any) -> Any:
    """``value`` as one of the types of ``hint``. Raises ``ValueError`` where it is none of them."""
    for kind in union_of(hint):
        try:
            return _fit_one(value, kind)
        except ValueError:
            continue
    raise ValueError


def _fit_one(value: Any, kind: Any) -> Any:
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if kind is int and whole:
        return value if isinstance(value, int) else int(value)
    if kind is float and (whole or isinstance(value, numbers.Real)) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError as error:
            raise ValueError from error
        return value if isinstance(value, (int, float)) else number
    if typing.get_origin(kind) is tuple:
        inner = typing.get_args(kind)[0]
        if isinstance(value, str) and inner is str:
            return (value,)
        if not isinstance(value, (tuple, list)):
            raise ValueError
        items = tuple(_fit(item, inner) for item in value)
        return value if items == value else items
    if typing.get_origin(kind) is typing.Literal:
        known = value in typing.get_args(kind)
    else:
        plain = typing.get_origin(kind) or kind
        known = plain not in (int, float) and isinstance(value, plain)
    if not known:
        raise ValueError
    return value


def _check_range(name: str, spec: dataclasses.Field[Any], value: Any, hint: Any) -> None:
    low, high, choices = (spec.metadata.get(key) for key in ("low", "high", "choices"))
    if choices is not None:
        wrong = [item for item in (value if isinstance(value, tuple) else (value,)) if item not in choices]
        if wrong:
            raise unknown(f"value of {name}", wrong[0], choices)
    if (low is not None or high is not None) and not _within(value, low, high):
        raise DitAttnError(f"{name} must be{_bounds(spec, ' ')}, got {shorten(value)}: {_help(spec)}")
    if {int, float} <= set(union_of(hint)) and isinstance(value, float) and not value <= 1.0:
        raise DitAttnError(
            f"{name} must be a fraction up to 1.0 or a whole number, got {shorten(value)}: {_help(spec)}; "
            f"write {int(value) if value < 1e9 else 1} for a count"
        )


def _within(value: Any, low: float | None, high: float | None) -> bool:
    """Whether a number, or every number of a list that has some, lies between two bounds."""
    if isinstance(value, tuple):
        return bool(value) and all(_within(item, low, high) for item in value)
    return bool((low is None or value >= low) and (high is None or value <= high))


def _bounds(spec: dataclasses.Field[Any], before: str) -> str:
    low, high = spec.metadata.get("low"), spec.metadata.get("high")
    if low is None and high is None:
        return ""
    return f"{before}at least {low}" if high is None else f"{before}between {low} and {high}"


def _help(spec: dataclasses.Field[Any]) -> str:
    return str(spec.metadata.get("help", spec.name))
