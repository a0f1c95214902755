"""The tables of isolation and SaaS, made from the records: ``python -m tests._support.subject_tables`` writes them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from typing import Any

from tests._support.page_tables import ROOT, PageTable, markdown

PIECES = (1, 2, 3, 4)
OBJECTS = {"present": "present", "color": "color", "other's color": "leak", "shape": "shape"}
PICTURES = {"background": "background", "prompt followed": "whole"}
ISOLATED = {
    "nothing (stock)": "stock",
    "words (the default)": "words",
    "words and regions": "words and regions",
    "regions (the paper)": "regions",
}
FOUND = {
    "words in regions that are found": "found words",
    "the same, whatever their quality": "found, whatever the quality",
}
GUIDED = "nothing, guidance {:g} for 2"
SCALED = {
    "nothing (stock)": "stock",
    **{f"nothing, guidance {scale:g} for 2": f"guidance {scale:g}" for scale in (2.2, 3.0, 4.0)},
    "the paper's rule": "the paper's rule",
    "the default (gated)": "gated",
    "closed loop, share 0.1": "closed loop 0.1",
    "`strength=16`, regions found": "strength 16",
    "the same, not gated": "strength 16, not gated",
    "the default, regions given": "boxes given",
    "**`strength=16`, regions given**": "strength 16, boxes given",
    **{f"by {factor} at every step, regions given": f"fixed {factor}" for factor in (4, 16, 32)},
    **{f"control: the words of another by {factor}": f"wrong words {factor}" for factor in (4, 16)},
    "control: by 16 everywhere": "fixed 16, everywhere",
    "the default, with isolation": "isolation and gated",
    "both, block-sparse at density 0.25": "isolation and gated, block-sparse 0.25",
}


@dataclass(frozen=True)
class SubjectTable(PageTable):
    """One table of a page.

    Attributes:
        head: title of the labels.
        rows: arm by label.
        columns: (record, figure) by title; a figure is what the verifier counts, ``mended`` (and broken, with
            McNemar's p) or ``counted`` (its rate with both) of such a figure, ``factor`` or ``quality``.
    """

    head: str
    rows: dict[str, str]
    columns: dict[str, tuple[str, str]]

    def text(self) -> str:
        """Return the table in Markdown; arms that no record has are left out."""
        records = {record for record, _ in self.columns.values()}
        lines = [
            [label, *(_cell(record, arm, what) for record, what in self.columns.values())]
            for label, arm in self.rows.items()
            if any(arm in arms_of(record) for record in records)
        ]
        return markdown([self.head, *self.columns], lines)


@cache
def arms_of(record: str) -> dict[str, Any]:
    """Return the arms of a record of benchmarks/subjects."""
    found: dict[str, Any] = json.loads((ROOT / "benchmarks/subjects" / f"{record}.json").read_text())["arms"]
    return found


def _cell(record: str, arm: str, what: str) -> str:
    row = arms_of(record).get(arm)
    if row is None:
        return ""
    if what in ("factor", "quality"):
        found = {**row.get("found", {}), **row.get("lift", {})}.get(what)
        return "" if found is None else f"{found:.2f}"
    kind, _, word = what.rpartition(" ")
    figure = row[word]
    if kind == "mended":
        changed = figure["mended"] + figure["broken"]
        p = f", p = {figure['p']:.0g}" if changed else ""
        return "" if arm == "stock" else f"{figure['mended']} / {figure['broken']}{p}"
    low, high = (100 * value for value in figure["ci95"])
    both = f", {figure['mended']} / {figure['broken']}" if kind == "counted" and arm != "stock" else ""
    return f"{100 * figure['rate']:.0f} [{low:.0f}, {high:.0f}]{both}"


def _isolation(model: str, objects: int, rows: dict[str, str]) -> SubjectTable:
    record = f"{model}_isolation_{objects}"
    columns = {
        title: (record, what)
        for title, what in {**OBJECTS, **PICTURES, "colors mended / broken": "mended color"}.items()
    }
    return SubjectTable("methods/isolation.md", record, "barred", rows, columns)


def _saas(model: str) -> SubjectTable:
    record = f"{model}_saas_2"
    figures = {"color": "color", "shape": "shape", "full prompt": "whole", "mended / broken": "mended color",
               "mean factor": "factor", "quality": "quality"}  # fmt: skip
    return SubjectTable("methods/saas.md", record, "arm", SCALED, {title: (record, x) for title, x in figures.items()})


def _edits(what: str, head: str) -> SubjectTable:
    columns = {f"{count} piece{'s' * (count > 1)}": (f"tiny-edit_saas_{count}", what) for count in PIECES}
    return SubjectTable("methods/saas.md", f"tiny-edit_saas_{what.rpartition(' ')[2]}", head, SCALED, columns)


TABLES = (
    _isolation("tiny-joint", 2, {**ISOLATED, GUIDED.format(6): "guidance 6"}),
    *(_isolation("tiny-multi", count, {**ISOLATED, **FOUND, GUIDED.format(4): "guidance 4"}) for count in (2, 3, 4)),
    *(_saas(model) for model in ("tiny-multi", "tiny-joint")),
    _edits("counted whole", "instruction done, nothing else changed"),
    _edits("followed", "pieces followed"),
    _edits("kept", "untouched objects kept"),
)


def main() -> None:
    """Write every table between its marks."""
    for table in TABLES:
        table.write()


if __name__ == "__main__":
    main()
