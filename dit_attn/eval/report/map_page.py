"""What pages of maps share: their look, and the script that reads a cell out. Each page is one file all the same."""

from __future__ import annotations

from pathlib import Path
from string import Template

SHARED = {"style": Path(__file__).with_name("map_page.css"), "script": Path(__file__).with_name("map_page.js")}


def filled(template: Path, **parts: str) -> str:
    """The page of a template with its parts, and with the shared ones as ``$style`` and ``$script``."""
    shared = {name: file.read_text(encoding="utf-8").rstrip() for name, file in SHARED.items()}
    return Template(template.read_text(encoding="utf-8")).substitute(shared, **parts)
