"""From ``--method NAME --set key=value`` (or the configuration file) to Method instances."""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass, field
from typing import Any

from dit_attn.errors import DitAttnError, unknown

if typing.TYPE_CHECKING:
    from dit_attn.processors.method import Method

# Settings that say the same thing in two ways: giving one drops the others when they came from a preset or a file.
_TABLE = ("densities", "parts", "calibration")
_INSTEAD: dict[str, tuple[str, ...]] = {
    "density": ("top_p", *_TABLE),
    "top_p": ("density", *_TABLE),
    "densities": ("top_p", "parts", "calibration"),
}


@dataclass
class Wanted:
    """A method as the user wrote it.

    Attributes:
        name: slug, or path of a file or folder of settings.
        settings: text from ``--set``, or values from a configuration file.
    """

    name: str
    settings: dict[str, Any] = field(default_factory=dict)


def wanted_methods(words: list[tuple[str, str]], config: dict[str, Any]) -> list[Wanted]:
    """The methods asked for. ``--method`` replaces those of the configuration file, ``--set`` changes them.

    Args:
        words: ("method" | "set", text) in the order of the command line.
        config: the configuration file; ``method`` and ``set`` are read.

    Raises:
        DitAttnError: a setting without a method, or not of the form KEY=VALUE.
    """
    named = [Wanted(text) for kind, text in words if kind == "method"]
    chosen = named or _from_config(config.get("method"))
    _apply(chosen, [(str(key), value, None) for key, value in _mapping(config.get("set"), "set").items()])
    position, changes = -1, []
    for kind, text in words:
        if kind == "method":
            position += 1
            continue
        key, sign, value = text.partition("=")
        if not sign or not key.strip():
            raise DitAttnError(f"--set {text!r} is not KEY=VALUE; write for instance --set density=0.25")
        changes.append((key.strip(), value.strip(), chosen[position] if named and position >= 0 else None))
    _apply(chosen, changes)
    return chosen


def resolve(wanted: list[Wanted], model: Any, preset: str | None) -> tuple[Method, ...]:
    """Method instances: defaults, then the preset, then what the user set.

    Args:
        wanted: from :func:`wanted_methods`.
        model: the transformer, or anything of its class name with its ``config`` (and ``pair``, whether the pipeline
            has a second one).
        preset: ``None`` or ``"auto"`` (the model's own), ``"none"``, or a name.

    Raises:
        DitAttnError: unknown method, preset or setting; a value of the wrong type or out of range.
    """
    from dit_attn.processors.presets import preset_for

    found = None
    if preset not in (None, "auto", "none"):
        found = preset_for(model, preset)
        if not wanted:
            slugs = ", ".join(found.methods) if found else ""
            raise DitAttnError(f"--preset {preset} without a method does nothing; add --method with one of: {slugs}")
    elif preset != "none":
        found = preset_for(model, pair=getattr(model, "pair", False))
    return tuple(_method(item, dict(found.methods) if found else {}) for item in wanted)


def _method(item: Wanted, preset: dict[str, dict[str, Any]]) -> Method:
    from dit_attn.processors.method import Method, is_place, method_class

    if is_place(item.name):
        base = Method.from_pretrained(item.name)
        cls, settings = type(base), {k: v for k, v in base.to_dict().items() if k != "method"}
    else:
        cls = method_class(item.name)
        settings = {k: v for k, v in preset.get(item.name, {}).items() if k != "provenance"}
    hints = typing.get_type_hints(cls)
    names = [spec.name for spec in dataclasses.fields(cls)]
    for key, value in item.settings.items():
        if key not in names:
            raise unknown(f"setting of {cls.slug}", key, names)
        settings[key] = typed(value, hints[key], f"{cls.slug}.{key}")
        for other in _INSTEAD.get(key, ()):
            if other not in item.settings:
                settings.pop(other, None)
    return Method.from_dict({**settings, "method": cls.slug})


def typed(value: Any, hint: Any, where: str) -> Any:
    """``value`` (text, or a value from YAML) as the type of a field.

    Args:
        value: what was given.
        hint: the field's type, e.g. ``float | None`` or ``tuple[str, ...]``.
        where: name for the message.

    Raises:
        DitAttnError: it does not fit.
    """
    from dit_attn.processors.fields import describe, union_of

    kinds = union_of(hint)
    for kind in sorted(kinds, key=_strictness):
        try:
            return _as(value, kind)
        except (ValueError, TypeError):
            continue
    quotes = "; put it in quotes: YAML reads 3, and 3:7 too, as a number" if str in kinds else ""
    raise DitAttnError(f"{where} must be {describe(hint)}, got {value!r}{quotes}")


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
        items = [part.strip() for part in value.strip("[]() ").split(",") if part.strip()] if text else value
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


def _none(value: Any) -> None:
    if value is None or (isinstance(value, str) and value.lower() in ("none", "null")):
        return None
    raise ValueError


def _strictness(kind: Any) -> int:
    """Whole numbers are tried before fractions, text last: "1" is a count, "1.0" a fraction."""
    order = (type(None), bool, int, float)
    return order.index(kind) if kind in order else (9 if kind is str else 5)


def _apply(chosen: list[Wanted], changes: list[tuple[str, Any, Wanted | None]]) -> None:
    for key, value, target in changes:
        slug, dot, rest = key.partition(".")
        if dot:
            match = [item for item in chosen if item.name == slug]
            if not match:
                raise unknown(
                    "method in --set", slug, [item.name for item in chosen] or ["none"], f"Add --method {slug}."
                )
            match[-1].settings[rest] = value
            continue
        if not chosen:
            raise DitAttnError(f"--set {key}={value} has no method to apply to; add --method NAME")
        (target or chosen[-1]).settings[key] = value


def _from_config(value: Any) -> list[Wanted]:
    """A slug, a list of them, ``{slug: settings}``, or a list of ``{method: slug, ...}`` as ``to_dict`` writes it."""
    if value is None:
        return []
    if isinstance(value, dict) and "method" not in value:
        return [Wanted(str(name), _mapping(settings, f"method.{name}")) for name, settings in value.items()]
    out = []
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, dict) and "method" in item:
            out.append(Wanted(str(item["method"]), {k: v for k, v in item.items() if k != "method"}))
        elif isinstance(item, dict):
            out += _from_config(item)
        elif isinstance(item, str):
            out.append(Wanted(item))
        else:
            raise DitAttnError(f"method in the configuration file must be a name or settings, got {item!r}")
    return out


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise DitAttnError(f"{where} in the configuration file must hold `key: value` lines, got {value!r}")
    return dict(value)
