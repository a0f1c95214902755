"""Format names and values: as lines of a terminal, as a table of a notebook."""

from __future__ import annotations

import dataclasses
import shutil
import sys
import textwrap
from collections.abc import Iterable
from html import escape
from typing import Any

from dit_attn.processors.methods.base import REGISTRY, plain
from dit_attn.processors.methods.presets import PresetUse, changed_settings

_WIDEST = 100
_NARROWEST = 40  # columns of a terminal that is still wrapped for

Rows = Iterable[tuple[str, str]]


def text_table(rows: Rows, label: int = 16, width: int | None = None) -> str:
    """Return a line for every name and value; long values go on below their beginning.

    Args:
        rows: names and values; a line break in a value is kept.
        label: columns of the names.
        width: columns of a line; default: those of the terminal, at most 100, and 100 where the output is no terminal.
    """
    if width is None:
        terminal = shutil.get_terminal_size((_WIDEST, 24)).columns if sys.stdout.isatty() else _WIDEST
        width = min(_WIDEST, max(_NARROWEST, terminal))
    indent = " " * (label + 1)
    wrap = textwrap.TextWrapper(width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    lines = []
    for name, value in rows:
        first, *more = value.split("\n")
        wrap.initial_indent = f"{name:<{label}} "
        lines += wrap.wrap(first) or [wrap.initial_indent.rstrip()]
        wrap.initial_indent = indent
        for line in more:
            lines += wrap.wrap(line)
    return "\n".join(lines)


def html_table(rows: Rows) -> str:
    """Return a small table for notebooks, escaped; its colors are those of the page, light or dark."""
    cells = "".join(
        f'<tr><th scope="row" style="text-align:left;vertical-align:top;white-space:nowrap">{escape(name)}</th>'
        f'<td style="text-align:left;white-space:pre-line">{escape(value)}</td></tr>'
        for name, value in rows
    )
    return f'<table style="color:inherit;background:transparent"><tbody>{cells}</tbody></table>'


def method_text(settings: dict[str, Any], shown: Iterable[str] | None = None) -> str:
    """Return a method with its settings, as in ``block-sparse(density=0.5)``.

    Args:
        settings: what ``Method.to_dict()`` returns.
        shown: names of the settings to show; default: those that differ from the method's defaults.
    """
    slug = str(settings["method"])
    if shown is None:
        specs = dataclasses.fields(REGISTRY[slug]) if slug in REGISTRY else ()
        shown = changed_settings(settings, {spec.name: plain(spec.default) for spec in specs})
    values = ", ".join(f"{name}={settings[name]}" for name in shown)
    return f"{slug}({values})" if values else slug


def methods_text(methods: Iterable[dict[str, Any]], presets: Iterable[PresetUse] = ()) -> str:
    """Return the methods with the settings that differ from the model's preset, or from the defaults."""
    changed = {use.method: use.changed for use in presets}
    return "; ".join(method_text(method, changed.get(method["method"])) for method in methods) or "none"


def percent(value: float | None) -> str:
    """Return ``"25.0 %"`` for 0.25, ``"-"`` for ``None``."""
    return "-" if value is None else f"{100 * value:.1f} %"
