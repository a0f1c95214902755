"""From methods as the user wrote them to Method instances: the preset below, the user's settings on top, typed."""

from __future__ import annotations

import dataclasses
import itertools
import re
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from dit_attn.cli.method_options import MethodSpec
from dit_attn.errors import DitAttnError, shorten, unknown
from dit_attn.files import is_place
from dit_attn.settings import describe, union_of

if typing.TYPE_CHECKING:
    from dit_attn.processors.methods.base import Method

# Settings that say the same thing in two ways: giving one drops the others when they came from a preset or a file.
_TABLE = ("densities", "parts", "calibration")
_INSTEAD: dict[str, tuple[str, ...]] = {
    "density": ("top_p", *_TABLE),
    "top_p": ("density", *_TABLE),
    "densities": ("top_p", "parts", "calibration"),
}

_BRACKET = re.compile(r"[\[\]()]")
_OUTER_COMMA = re.compile(r",(?![^\[(]*[\])])")


def resolve(specs: Sequence[MethodSpec], model: Any, preset: str | None) -> tuple[Method, ...]:
    """Make Method instances: defaults, then the preset, then what the user set.

    Args:
        specs: from :func:`method_specs`, or one variant.
        model: the transformer, or anything of its class name with its ``config`` (and ``pair``, whether the pipeline
            has a second one).
        preset: ``None`` or ``"auto"`` (the model's own), ``"none"``, or a name.

    Raises:
        DitAttnError: unknown method, preset or setting; a value of the wrong type or out of range.
    """
    from dit_attn.processors.methods.presets import preset_for

    found = None
    if preset not in (None, "auto", "none"):
        found = preset_for(model, preset)
        if not specs:
            slugs = ", ".join(found.methods) if found else ""
            raise DitAttnError(f"--preset {preset} without a method does nothing; add --method with one of: {slugs}")
    elif preset != "none":
        found = preset_for(model, pair=getattr(model, "pair", False))
    methods = (_method(spec, dict(found.methods) if found else {}) for spec in specs)
    return tuple(method.for_preset(found.name if found else None) for method in methods)


def _method(spec: MethodSpec, preset: dict[str, dict[str, Any]]) -> Method:
    from dit_attn.processors.methods.base import Method, method_class

    if is_place(spec.name):
        base = Method.from_pretrained(spec.name)
        cls, settings = type(base), {k: v for k, v in base.to_dict().items() if k != "method"}
    else:
        cls = method_class(spec.name)
        settings = {k: v for k, v in preset.get(spec.name, {}).items() if k != "provenance"}
    for key, value in typed_settings(cls, spec.settings).items():
        settings[key] = value
        for other in _INSTEAD.get(key, ()):
            if other not in spec.settings:
                settings.pop(other, None)
    return Method.from_dict({**settings, "method": cls.slug})


def typed_settings(cls: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Convert settings to the types of a method's fields.

    Args:
        cls: the method, or anything with its fields and slug.
        settings: text, or values from YAML.

    Raises:
        DitAttnError: no setting of that name, or a value of another type.
    """
    hints = typing.get_type_hints(cls)
    names = [spec.name for spec in dataclasses.fields(cls)]
    for key in settings:
        if key not in names:
            raise unknown(f"setting of {cls.slug}", key, names)
    return {key: typed(value, hints[key], f"{cls.slug}.{key}") for key, value in settings.items()}


def typed(value: Any, hint: Any, where: str) -> Any:
    """Convert ``value`` (text, or a value from YAML) to the type of a field.

    Args:
        value: what was given.
        hint: the field's type, e.g. ``float | None`` or ``tuple[str, ...]``.
        where: name for the message.

    Raises:
        DitAttnError: it does not fit.
    """
    kinds = union_of(hint)
    for kind in sorted(kinds, key=_strictness):
        try:
            return _as(value, kind)
        except (ValueError, TypeError, OverflowError):
            continue
    quotes = "; put it in quotes: YAML reads 3, and 3:7 too, as a number" if str in kinds else ""
    raise DitAttnError(f"{where} must be {describe(hint)}, got {shorten(value)}{quotes}")


def _as(value: Any, kind: Any) -> Any:
    text = isinstance(value, str)
    if kind is type(None):
        return _none(value)
    if kind is bool:
        words = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
        if isinstance(value, bool):
            return value
        if text and value.lower() in words:
            return words[value.lower()]
        raise ValueError
    if kind in (int, float):
        if isinstance(value, bool) or (kind is int and not text and value != int(value)):
            raise ValueError
        if kind is int and isinstance(value, float):
            raise ValueError
        return kind(value)
    if typing.get_origin(kind) is tuple:
        inner = typing.get_args(kind)[0]
        items = _items(value) if text else value
        if not isinstance(items, (list, tuple)):
            items = [items]
        return tuple(typed(item, inner, "item") for item in items)
    if kind is str and text:
        return value
    if typing.get_origin(kind) is dict or kind is dict:
        if isinstance(value, dict):
            return value
    elif typing.get_origin(kind) is typing.Literal and value in typing.get_args(kind):
        return value
    raise ValueError


def _items(text: str) -> list[str]:
    """The items of a list: ``a,b`` or ``[a,b]``; an item may be a list in brackets, ``a,[b,c]``."""
    flat = text.strip("[]() ")
    if _BRACKET.search(flat) or len(_BRACKET.findall(text)) > 2:
        flat = text.strip()
        depths = list(itertools.accumulate((c in "[(") - (c in "])") for c in flat))
        flat = flat[1:-1] if 0 not in depths[:-1] else flat
    return [part.strip() for part in _OUTER_COMMA.split(flat) if part.strip()]


def _none(value: Any) -> None:
    if value is None or (isinstance(value, str) and value.lower() in ("none", "null")):
        return None
    raise ValueError


def _strictness(kind: Any) -> int:
    """Whole numbers are tried before fractions, text last: "1" is a count, "1.0" a fraction."""
    order = (type(None), bool, int, float)
    return order.index(kind) if kind in order else (9 if kind is str else 5)
