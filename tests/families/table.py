"""The table of families and methods, made from the tests: ``python -m tests.families.table`` puts it in the README."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path

from dit_attn.processors.attach.families import Family, families, family_of
from dit_attn.processors.methods import methods
from tests._support.family_mixin import FamilyMixin

ROOT = Path(__file__).resolve().parents[2]
BEGIN, END = "<!-- families: begin -->", "<!-- families: end -->"
OF_TEXT = ("gag", "isolation", "nag", "reposition", "reweighting", "saas")
"""Methods about a text or pieces of it."""


def tested() -> dict[str, list[type[FamilyMixin]]]:
    """Test classes by family name: every class that inherits the mixin, found by importing the test modules."""
    found: dict[str, list[type[FamilyMixin]]] = {}
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        module = importlib.import_module(f"tests.families.{path.stem}")
        for _, cls in inspect.getmembers(module, inspect.isclass):
            if issubclass(cls, FamilyMixin) and cls.__name__.startswith("Test") and cls.__module__ == module.__name__:
                found.setdefault(family_of(cls().model()).name, []).append(cls)
    return found


def table() -> str:
    """The Markdown table; a tick stands for the mixin's tests with that method on a tiny model of the family."""
    cases, slugs = tested(), sorted(methods())
    head = ["family", "models", "sequence", "full runs", "positions", *slugs]
    rows = [head, ["---"] * len(head)]
    rows += [_row(row, cases.get(row.name, []), slugs) for row in families()]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def _row(row: Family, cases: list[type[FamilyMixin]], slugs: list[str]) -> list[str]:
    if row.refused:
        return [f"`{row.name}`", row.models, f"refused: {row.refused}", "", "", *("" for _ in slugs)]
    orders = list(dict.fromkeys(", ".join(case.kinds) for case in cases))
    whole = not all(case.no_pipeline for case in cases)
    moved = "; ".join(sorted({"yes" if case.rotary else "fixed" for case in cases}, reverse=True))
    return [
        f"`{row.name}`",
        row.models,
        "; ".join(orders),
        "yes" if whole else "",
        moved,
        *(("no" if slug in row.refused_methods else _cell(slug, moved, cases)) if cases else "" for slug in slugs),
    ]


def _cell(slug: str, moved: str, cases: list[type[FamilyMixin]]) -> str:
    if slug in OF_TEXT and not any(case().has_text for case in cases):
        return "no text"
    return moved if slug == "reposition" else "yes"


def main() -> None:
    """Write the table between its marks in the README."""
    readme = ROOT / "README.md"
    text = readme.read_text()
    start, stop = text.index(BEGIN) + len(BEGIN), text.index(END)
    readme.write_text(text[:start] + "\n" + table() + "\n" + text[stop:])


if __name__ == "__main__":
    main()
