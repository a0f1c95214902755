"""The tables of selectors and of error control, made from the records.

``python -m tests._support.selector_tables`` writes them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from typing import Any

from tests._support.page_tables import ROOT, PageTable, markdown

COSTS = ("0.1", "0.15", "0.25")
FAMILIES = {
    "default": "`error` (the default)",
    "by mass": "`mass`",
    "by sol": "`sol`, a row",
    "sol-attn": "Sol-Attn: `sol`, a layer",
    "by sub-block": "`sub-block`",
    "by dfs": "`dfs`",
    "by pisa": "`pisa`",
    "by ear": "`ear`",
    "by ear-centered": "`ear-centered`",
    "by error, a head": "`error`, a head",
    "by ear-centered, a head": "`ear-centered`, a head",
    "rectified-spaattn:selector=pisa,spread=head": "`pisa`, a head",
    "rectified-spaattn:probe=18,spread=head": "`error` of half blocks, a head",
    "by measured mass": "`measured` mass",
    "by measured error": "`measured` error",
    "combined": "`measured` error, a head, `fine=0.1`",
    "pisa": "PISA: `mass`, first-order term",
    "dfsattn": "DFSAttn: `dfs`, nothing for skipped blocks",
    "block-sparse": "`mass`, nothing for skipped blocks",
    "re-ttention selected": "Re-ttention, `selected`",
    "oracle mass": "oracle: true mass of this call",
    "oracle error, a row": "oracle: true error",
    "oracle error, a head": "oracle: true error, a head",
}


@dataclass(frozen=True)
class SelectorTable(PageTable):
    """Errors of every family at equal cost, the smallest first.

    Attributes:
        record: under benchmarks/operators.
    """

    record: str

    def text(self) -> str:
        """Return the table in Markdown; costs below the cheapest way of a family are left empty."""
        data = record_of(f"operators/{self.record}")
        errors = {name: data["equal_cost"][name] for name in ("l2", "shift", "lse")}
        rows = []
        for family, title in FAMILIES.items():
            found = [errors["l2"][cost].get(family) for cost in COSTS]
            if any(found):
                others = [errors[name]["0.15"].get(family) for name in ("shift", "lse")]
                spent = [row["choosing"] for row in data["rows"] if row["family"] == family]
                ratio = sum(spent) / len(spent) / data["dense_seconds"]
                cells = [*(_cell(x) for x in found), *(_short(x) for x in others), f"{ratio:.2f}"]
                rows.append((_order(found), [title, *cells]))
        head = ["blocks ranked by", *(f"error at cost {cost}" for cost in COSTS), "mean, .15", "LSE, .15", "choosing"]
        return markdown(head, [cells for _, cells in sorted(rows, key=lambda row: row[0])])


@dataclass(frozen=True)
class ControlTable(PageTable):
    """Densities that follow the error next to fixed ones with dense steps, by number of steps and density.

    Attributes:
        record: under benchmarks.
    """

    record: str

    def text(self) -> str:
        """Return the table in Markdown."""
        rows = {(row["arm"], row["steps"]): row for row in record_of(self.record)["rows"]}
        lines = []
        for (arm, steps), row in rows.items():
            if not arm.startswith("controlled "):
                continue
            density = arm.removeprefix("controlled ")
            fixed, plain = (rows[f"{name} {density}", steps] for name in ("dense steps", "fixed"))
            shares = (f"{each['share']['value']:.2f}" for each in (plain, fixed, row))
            decibels = (f"{each['psnr']['value']:.1f}" for each in (plain, fixed, row))
            change = row["psnr - dense steps"]
            low, high = change["ci95"]
            cells = [f"{a}, {b} dB" for a, b in zip(shares, decibels)]
            lines.append([str(steps), density, *cells, f"{change['value']:+.1f} [{low:+.1f}, {high:+.1f}]"])
        head = ["steps", "density", "no dense steps: share, PSNR", "the preset's dense steps", "`target_error`"]
        return markdown([*head, "dB to the preset's dense steps"], lines)


@cache
def record_of(name: str) -> dict[str, Any]:
    """Return a record of benchmarks."""
    found: dict[str, Any] = json.loads((ROOT / f"benchmarks/{name}.json").read_text())
    return found


def _order(found: list[Any]) -> float:
    """The error at the middle cost; those that it is too low for come after, by the last one."""
    return found[1]["value"] if found[1] else 10 + found[2]["value"]


def _cell(figure: dict[str, Any] | None) -> str:
    return "" if figure is None else f"{figure['value']:.3f} [{figure['ci95'][0]:.3f}, {figure['ci95'][1]:.3f}]"


def _short(figure: dict[str, Any] | None) -> str:
    return "" if figure is None else f"{figure['value']:.3f}"


SOURCES = ("selectors_tiny-video",)
CONTROLLED = ("tiny-image",)
TABLES: tuple[PageTable, ...] = (
    *(SelectorTable("methods/selectors.md", name, name) for name in SOURCES),
    *(ControlTable("methods/selectors.md", f"error_control_{name}", f"error_control/{name}") for name in CONTROLLED),
)


def main() -> None:
    """Write every table between its marks."""
    for table in TABLES:
        table.write()


if __name__ == "__main__":
    main()
