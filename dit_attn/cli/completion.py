"""What a shell may complete: commands, flags, and the names that a flag takes; nothing heavy is imported."""

from __future__ import annotations

import dataclasses
import itertools
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dit_attn.cli.early_check import preset_names
from dit_attn.cli.method_index import known_methods
from dit_attn.cli.options import SWITCHES, Flag
from dit_attn.cli.source_index import constant

_DEVICES = ("auto", "cpu", "cuda", "mps")
_METHODS = ("--method", "--set")


def complete(words: Sequence[str], commands: Mapping[str, Any]) -> list[str]:
    """Return the words that may stand in place of the last one.

    Args:
        words: of the command line behind ``dit-attn``; the last one is being written and may be empty.
        commands: flags of every command by title of their group, as a function without arguments, by command.
    """
    *before, current = words or [""]
    if not before:
        return _fitting(current, [*commands, "--help", "--version"])
    name = before[0]
    if name not in commands:
        return []
    groups = commands[name]()
    flags = {text: flag for group in groups.values() for flag in group for text in _spellings(flag)}
    takes_methods = "methods" in groups
    flag, sign, value = current.partition("=")
    if sign and (flag in flags or (takes_methods and flag in _METHODS)):
        return [f"{flag}={found}" for found in _values(flag, flags, value, before)]
    last = before[-1]
    if (takes_methods and last in _METHODS) or _takes_value(flags.get(last)):
        return _values(last, flags, current, before)
    if current.startswith("-"):
        every = [*flags, *(f"--no-{one.name}" for one in flags.values() if one.kind == "on-or-off")]
        return _fitting(current, [*dict.fromkeys(every), *(_METHODS if takes_methods else ()), "--help", "--debug"])
    inner = next((flags[word] for word in reversed(before[1:]) if word in flags), None)
    if inner is not None and inner.nargs == "+":
        return _names(inner, name, current)
    positional = next((one for group in groups.values() for one in group if one.positional), None)
    return _names(positional, name, current) if positional is not None and len(before) == 1 else []


def _spellings(flag: Flag) -> tuple[str, ...]:
    return () if flag.positional or flag.hidden else (f"--{flag.name}", *flag.short)


def _takes_value(flag: Flag | None) -> bool:
    return flag is not None and flag.kind not in (*SWITCHES, "switch-or-dict")


def _values(flag: str, flags: Mapping[str, Flag], current: str, before: Sequence[str]) -> list[str]:
    """What a flag takes, ``current`` being the beginning."""
    if flag == "--method":
        return _methods(current)
    if flag == "--set":
        named = [after for word, after in itertools.pairwise(before) if word == "--method"]
        slug = named[-1].partition(":")[0] if named else "softpag" if before[0] == "search" else ""
        return _settings(slug, current)
    return _names(flags[flag], before[0], current)


def _methods(current: str) -> list[str]:
    """A method, or behind its colon its settings; several are joined by `` + ``."""
    joined, plus, last = current.rpartition("+")
    head = f"{joined}{plus}{last[: len(last) - len(last.lstrip())]}"
    slug, colon, settings = last.strip().partition(":")
    if not colon:
        return [f"{head}{name}" for name in _fitting(slug, known_methods())]
    done, comma, setting = settings.rpartition(",")
    if comma and "=" not in setting and "=" in done and setting and not _settings(slug, setting):
        return []  # an item of a list
    return [f"{head}{slug}:{done}{comma}{found}" for found in _settings(slug, setting)]


def _settings(slug: str, current: str) -> list[str]:
    """``KEY=`` of a method, or behind it the values that it may have."""
    method = known_methods().get(slug)
    if method is None:
        return []
    fields = {field.name: field for field in dataclasses.fields(method)}
    key, sign, value = current.partition("=")
    if not sign:
        return _fitting(current, [f"{name}=" for name in fields])
    if key not in fields:
        return []
    yes_no = ("true", "false") if typing.get_type_hints(method)[key] is bool else ()
    return [f"{key}={found}" for found in _fitting(value, fields[key].metadata.get("choices") or yes_no)]


def _names(flag: Flag, command: str, current: str) -> list[str]:
    """The names that a flag takes; none for numbers, texts and files, which the shell completes itself."""
    if flag.metavar and "," in flag.metavar:  # a list of names
        done, comma, current = current.rpartition(",")
        return [f"{done}{comma}{name}" for name in _fitting(current, _known(flag, command))]
    return _fitting(current, _known(flag, command))


def _known(flag: Flag, command: str) -> Iterable[str]:
    if flag.choices:
        return flag.choices
    if flag.kind == "device":
        return _DEVICES
    found = _KNOWN.get((command, flag.name)) or _KNOWN.get(("", flag.name))
    return found() if found else ()


def _fitting(current: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if name.startswith(current)]


def _constant(*places: tuple[str, str]) -> Any:
    """A function that lists the names in constants of modules."""
    return lambda: [name for place in places for name in constant(*place)]


def _models() -> list[str]:
    from dit_attn import models

    return list(models.available())


def _trainable() -> list[str]:
    return [*constant("dit_attn.models.recipe", "RECIPES"), constant("dit_attn.models.world_clip", "NAME")]


_BENCH = "dit_attn.cli.commands.bench"
_EVAL = (("dit_attn.eval.metrics", "METRICS"), ("dit_attn.cli.commands.eval.items", "ITEM_METRICS"))
# What a flag of a command (of any, without one) takes, where its names are no choices of the flag.
_KNOWN: dict[tuple[str, str], Any] = {
    ("", "model"): _models,
    ("", "preset"): lambda: ("auto", "none", *preset_names()),
    ("methods", "name"): known_methods,
    ("train", "name"): _trainable,
    ("bench", "what"): _constant((f"{_BENCH}.command", "JOBS")),
    ("bench", "config"): _constant((f"{_BENCH}.early", "CONFIGS")),
    ("bench", "shape"): _constant(("dit_attn.kernels.benchmark.measure", "SHAPES")),
    ("bench", "source"): _constant((f"{_BENCH}.early", "SOURCES")),
    ("bench", "inputs"): _constant(("dit_attn.kernels.benchmark.inputs", "KINDS")),
    ("eval", "metric"): _constant(*_EVAL),
    ("compare", "metrics"): _constant(("dit_attn.pipelines.compare.metrics", "METRICS")),
}
