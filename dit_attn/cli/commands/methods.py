"""``dit-attn methods``: the methods, and the settings of one of them."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import itertools
import json
import re
import typing
from collections.abc import Mapping
from typing import Any

from dit_attn.cli import options as flags
from dit_attn.cli import parser as parsers
from dit_attn.cli.method_index import known_methods, module_text
from dit_attn.cli.method_options import MethodSpec, written
from dit_attn.cli.table import Table, fields, show
from dit_attn.errors import unknown
from dit_attn.settings import describe as describe_type

GROUPS = {
    "method": (
        flags.Flag(
            "name", "method to describe", default="all, one line each", metavar="NAME", positional=True, nargs="?"
        ),
    ),
    "output": flags.only(flags.OUTPUT, "json"),
}
_EXAMPLES = """examples:
  dit-attn methods
  dit-attn methods block-sparse
"""
_PAPER = re.compile(r"\barXiv (\d{4}\.\d{4,5})")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``methods``."""
    parsers.describe(
        parser,
        "methods [NAME] [--json]",
        "List the methods; with a name, its settings with type, range, default and an example.",
        _EXAMPLES,
    )
    parsers.add_groups(parser, GROUPS)


def run(args: argparse.Namespace) -> int:
    """Print the list, or one method. Returns 0.

    Raises:
        DitAttnError: no method of that name.
    """
    options = flags.merge(args, GROUPS)
    known = known_methods()
    if "name" in options:
        if options["name"] not in known:
            raise unknown("method", options["name"], known)
        data = describe(known[options["name"]])
        if options.get("json"):
            print(json.dumps(data, indent=1))
        else:
            _show_one(data)
        return 0
    rows = [overview(cls) for cls in known.values()]
    if options.get("json"):
        print(json.dumps(rows, indent=1))
    else:
        table = Table(
            ("method", "kind", "what it does", "paper"),
            [(row["method"], row["kind"], row["summary"], row["paper"] or "") for row in rows],
            folded=("what it does",),
        )
        show(table, "", "`dit-attn methods NAME` lists the settings of one.")
    return 0


def overview(cls: Any) -> dict[str, Any]:
    """Return what a method is in one line, as JSON values: slug, kind, first line of its docstring, arXiv number."""
    text = inspect.getdoc(cls) or ""
    found = _PAPER.search(module_text(cls))
    return {
        "method": cls.slug,
        "class": cls.__name__,
        "kind": cls.role,
        "summary": text.partition("\n\n")[0].replace("\n", " "),
        "paper": f"arXiv {found[1]}" if found else None,
    }


def describe(cls: Any) -> dict[str, Any]:
    """Return a method and its settings as JSON values: the fields of its class, its own before inherited ones."""
    hints, own = typing.get_type_hints(cls), inspect.get_annotations(cls)
    unset = {field.name: field.metadata.get("unset", field.default) for field in dataclasses.fields(cls)}
    defaults = {name: list(value) if isinstance(value, tuple) else value for name, value in unset.items()}
    settings: list[dict[str, Any]] = [
        {
            "name": field.name,
            "default": defaults[field.name],
            "type": describe_type(hints[field.name]),
            **{key: field.metadata.get(key) for key in ("low", "high", "choices", "help")},
        }
        for field in sorted(dataclasses.fields(cls), key=lambda field: field.name not in own)
    ]
    spec = MethodSpec(cls.slug, _telling(cls, {row["name"]: row["default"] for row in settings}))
    example = f'dit-attn generate --model tiny-image --method {spec} --prompt "a large red circle at the left on white"'
    return {**overview(cls), "settings": settings, "example": example}


def _telling(cls: Any, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return the setting of the example: the one whose field names an example, else the first that has a default."""
    named = {field.name: field.metadata["example"] for field in dataclasses.fields(cls) if "example" in field.metadata}
    given = named or {name: value for name, value in defaults.items() if value not in (None, "", [])}
    return dict(itertools.islice(given.items(), 1))


def _show_one(data: dict[str, Any]) -> None:
    about = {"method": f"{data['method']} ({data['kind']}; dit_attn.{data['class']})", "does": data["summary"]}
    if data["paper"]:
        number = data["paper"].removeprefix("arXiv ")
        about["paper"] = f"{data['paper']}, https://arxiv.org/abs/{number}"
    rows = [
        (row["name"], written(row["default"]) or "(empty)", _allowed(row), row["help"] or "")
        for row in data["settings"]
    ]
    table = Table(("setting", "default", "allowed", "what it sets"), rows, folded=("allowed", "what it sets"))
    show(fields({**about, "example": data["example"]}), "", table)


def _allowed(row: dict[str, Any]) -> str:
    """The type of a setting, with its range or choices."""
    low, high, choices = row["low"], row["high"], row["choices"]
    if choices is not None:
        return f"{'any of ' if row['type'].startswith('a list') else ''}{', '.join(map(str, choices))}"
    if low is None and high is None:
        return str(row["type"])
    if high is None:
        return f"{row['type']}, at least {low:g}"
    tiny = low is not None and 0.0 < low < 1e-3  # stands for what is above 0
    return f"{row['type']}, {f'above 0, at most {high:g}' if tiny else f'{low:g} to {high:g}'}"
