"""Render the HTML pages: one Jinja template per page on ``base.html``, everything escaped, each page a single file."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2

from dit_attn.eval.report.heatmap import SCALE, rgb


@lru_cache(maxsize=1)
def environment() -> jinja2.Environment:
    """Build the environment of the templates in this folder: autoescape on, an unknown name is an error."""
    found = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    found.filters["chunks"] = chunks
    stops = ", ".join(rgb(i / (len(SCALE) - 1)) for i in range(len(SCALE)))
    found.globals["gradient"] = f"linear-gradient(90deg, {stops})"
    return found


def render(template: str, **values: Any) -> str:
    """Render the page ``template`` with its values; text in them is escaped."""
    return environment().get_template(template).render(**values)


def chunks(label: object) -> list[str]:
    """Split the label of a method where a narrow column may break it: behind ``:`` and ``,``, in front of ``+``."""
    return re.split(r"(?<=[:,])(?=\S)|(?= \+ )", str(label))
