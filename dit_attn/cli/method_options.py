"""One grammar for methods: ``--method NAME:KEY=VALUE,... + NAME:...``, ``--set KEY=VALUE``, and the configuration file.

``--method NAME --set KEY=VALUE`` and ``--method NAME:KEY=VALUE`` are the same in every command. A command that runs one
pipeline enables all methods together; one that compares takes every ``--method`` as a variant, and `` + `` joins
methods that run together in one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dit_attn.errors import DitAttnError, shorten, unknown

if TYPE_CHECKING:
    from dit_attn.cli.options import Options

CALL = "call"  # stands among the methods of a variant for arguments of the pipeline's call
_QUOTES, _OPEN, _CLOSE = "\"'", "([{", ")]}"
_JOIN = re.compile(r"\s\+\s|\+(?=[A-Za-z/.~])")
_COMMA = re.compile(r",(?=\s*[A-Za-z_]\w*\s*=)")
_DRIVE = re.compile(r"[A-Za-z]:[\\/]")  # its colon is no separator


@dataclass
class MethodSpec:
    """A method as the user wrote it.

    Attributes:
        name: slug, path of a file or folder of settings, ``org/name`` on the Hub, or ``call``.
        settings: text of the command line, or values of a configuration file.
    """

    name: str
    settings: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        settings = ",".join(f"{key}={written(value)}" for key, value in self.settings.items())
        name = f'"{self.name}"' if _JOIN.search(self.name) or ":" in self.name[2:] else self.name
        return f"{name}:{settings}" if settings else name


Variant = list[MethodSpec]  # methods that run together


def parse_method(text: str) -> Variant:
    """Read ``block-sparse:density=0.25,keep=text,diagonal + other`` as methods with settings.

    A comma separates settings where ``KEY=`` follows it; elsewhere it belongs to a list. Nothing is split inside quotes
    and brackets; quotes around a value are removed.

    Raises:
        DitAttnError: no name, a setting that is not KEY=VALUE, or a quote without an end.
    """
    specs = []
    for part in _split(text, _JOIN):
        name, rest = _name_and_rest(part.strip())
        spec = MethodSpec(_bare(name.strip()))
        if not spec.name:
            raise DitAttnError(
                f"--method {shorten(text)} names no method; write for instance block-sparse:density=0.25"
            )
        for piece in _split(rest, _COMMA) if rest is not None else []:
            key, sign, value = piece.partition("=")
            if not sign or not key.strip():
                raise DitAttnError(
                    f"--method {shorten(text)}: {shorten(piece)} is not KEY=VALUE; write {spec.name}:density=0.25"
                )
            spec.settings[key.strip()] = _bare(value.strip())
        specs.append(spec)
    return specs


def method_variants(options: Options) -> list[Variant]:
    """Return the methods of the command line or the configuration file, one variant per ``--method``.

    ``--method`` replaces the methods of the configuration file; ``--set`` changes the method before it, or the only
    one.

    Raises:
        DitAttnError: bad grammar, a setting without a method, or one that could belong to several.
    """
    named = [parse_method(text) for kind, text in options.words if kind == "method"]
    variants = named or _from_config(options.config.get("method"))
    for key, value in _mapping(options.config.get("set"), "set").items():
        _set(variants, None, str(key), value, f"set: {key} in the configuration file")
    position = -1
    for kind, text in options.words:
        if kind == "method":
            position += 1
            continue
        key, sign, value = text.partition("=")
        if not sign or not key.strip():
            raise DitAttnError(f"--set {shorten(text)} is not KEY=VALUE; write for instance --set density=0.25")
        before = variants[position] if named and position >= 0 else None
        _set(variants, before, key.strip(), _bare(value.strip()), f"--set {text}")
    return variants


def method_specs(options: Options) -> list[MethodSpec]:
    """Return the same methods as one list, for a command that enables all of them together.

    Raises:
        DitAttnError: as :func:`method_variants`; arguments of the call among them.
    """
    specs = [spec for variant in method_variants(options) for spec in variant]
    if any(spec.name == CALL for spec in specs):
        raise DitAttnError(
            f"`{CALL}:` sets arguments of the pipeline's call for one variant of `dit-attn compare`; here give the "
            "argument's flag, or --pipeline-kwargs"
        )
    return specs


def label(variant: Variant) -> str:
    """Write the variant in the grammar of ``--method``, whichever way it was written."""
    return " + ".join(map(str, variant))


def _set(variants: list[Variant], before: Variant | None, key: str, value: Any, what: str) -> None:
    """Apply one ``--set`` to the method it belongs to."""
    everyone = [spec for variant in variants for spec in variant]
    if not everyone:
        raise DitAttnError(f"{what} has no method to apply to; add --method NAME")
    name, dot, rest = key.partition(".")
    if not dot:
        found = [spec for spec in (everyone if before is None else before) if spec.name != CALL]
        if len(found) != 1:
            names = " or ".join(dict.fromkeys(spec.name for spec in found)) or "the call"
            raise DitAttnError(f"{what} could belong to {names}; put it behind its --method, or write NAME.{key}")
        found[0].settings[key] = value
        return
    found = [spec for spec in before or () if spec.name == name] or [spec for spec in everyone if spec.name == name]
    if not found:
        raise unknown("method in --set", name, dict.fromkeys(spec.name for spec in everyone), f"Add --method {name}.")
    if len(found) > 1:
        raise DitAttnError(f"{what} could belong to {len(found)} methods {name}; put it behind its --method")
    found[0].settings[rest] = value


def _split(text: str, separator: re.Pattern[str]) -> Iterator[str]:
    """Pieces of ``text`` between separators that are outside quotes and brackets."""
    start, place, quote, depth = 0, 0, "", 0
    while place < len(text):
        letter = text[place]
        if quote:
            quote = "" if letter == quote else quote
        elif letter in _QUOTES and (place == 0 or text[place - 1] in "=,:([{ "):
            quote = letter
        elif letter in _OPEN + _CLOSE:
            depth = max(0, depth + (1 if letter in _OPEN else -1))
        elif not depth and (found := separator.match(text, place)):
            yield text[start:place]
            start = place = found.end()
            continue
        place += 1
    if quote:
        raise DitAttnError(f"--method {shorten(text)}: the quote {quote} has no end")
    yield text[start:]


def _name_and_rest(part: str) -> tuple[str, str | None]:
    """The name of a method and what follows its colon, ``None`` without a colon."""
    if part[:1] in _QUOTES and part:
        end = part.index(part[0], 1) + 1
    else:
        end = part.find(":", 2 if _DRIVE.match(part) else 0)
    if end < 0 or end == len(part):
        return part, None
    return part[:end], part[end:].partition(":")[2]


def _bare(text: str) -> str:
    """A value without the quotes around it."""
    return text[1:-1] if len(text) > 1 and text[0] in _QUOTES and text[-1] == text[0] else text


def written(value: Any) -> str:
    """A value in the grammar of ``--method``."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        rows = [isinstance(item, (list, tuple)) for item in value]
        text = ",".join(f"[{written(item)}]" if row else written(item) for item, row in zip(value, rows))
        return f"[{text}]" if any(rows) else text
    text = str(value)
    plain = not any(separator.search(text) for separator in (_JOIN, _COMMA)) and text[:1] not in _QUOTES
    quote = "'" if '"' in text else '"'
    return text if plain or text[:1] in _OPEN else f"{quote}{text}{quote}"


def _from_config(value: Any) -> list[Variant]:
    """A text in the grammar, ``{slug: settings}``, ``{method: slug, ...}`` as ``to_dict`` writes it, or a list of them.

    Every item of a list is a variant.
    """
    items = value if isinstance(value, list) else [] if value is None else [value]
    return [_config_variant(item) for item in items]


def _config_variant(item: Any) -> Variant:
    if isinstance(item, dict) and "method" in item:
        return [MethodSpec(str(item["method"]), {key: value for key, value in item.items() if key != "method"})]
    if isinstance(item, dict):
        return [MethodSpec(str(name), _mapping(settings, f"method.{name}")) for name, settings in item.items()]
    if isinstance(item, str):
        return parse_method(item)
    raise DitAttnError(f"method in the configuration file must be a name or settings, got {shorten(item)}")


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise DitAttnError(f"{where} in the configuration file must hold `key: value` lines, got {shorten(value)}")
    return dict(value)
