"""Tables of the sparse methods, made from the records: ``python -m tests._support.result_tables`` writes them.

The README shows :data:`ROWS`, ``docs/results.md`` every row of the records.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BEGIN, END = "<!-- comparison: begin -->", "<!-- comparison: end -->"
RECORDS = ("benchmarks/readers/tiny-image.json", "benchmarks/readers/tiny-video.json")
ROWS = {
    "dense": "dense",
    "re-ttention:density=0.0625,mask=selected": "`re-ttention`, `mask=selected`",
    "re-ttention:density=0.03,mask=selected": "`re-ttention`, `mask=selected`, density 0.03",
    "re-ttention:density=0.0625,mask=window": "`re-ttention` (default mask)",
    "re-ttention:density=0.0625,mask=band": "`re-ttention`, the paper's band",
    "rectified-spaattn:density=0.25": "`rectified-spaattn`",
    "rectified-spaattn:density=0.125": "`rectified-spaattn`, density 0.125",
    "rectified-spaattn:density=0.25,compensation=repo,select=mass": "the same at 0.25 as in the released code",
    "rectified-spaattn:density=0.25,compensation=paper,select=mass": "the same at 0.25 as in the paper",
    "block-sparse:density=0.25": "`block-sparse`",
    "block-sparse:density=0.125": "`block-sparse`, density 0.125",
}
"""Label of a row by label of the record; the slug alone is the default density (0.0625, 0.25, 0.25)."""


def table(full: bool = False) -> str:
    """Return the Markdown table of :data:`ROWS`, or with ``full`` of every row of the records."""
    records = [json.loads((ROOT / name).read_text()) for name in RECORDS]
    found = [{row["label"]: row for row in record["headline"]} for record in records]
    rows = {label: "dense" if label == "dense" else f"`{label}`" for label in found[0]} if full else ROWS
    head = ["", "attention computed, % of dense", "images: PSNR to dense, dB", "prompt followed, %"]
    head += ["videos: PSNR to dense, dB", "prompt followed, %"]
    lines = [head, ["---"] * len(head)]
    for label, shown in rows.items():
        image, video = (record[label] for record in found)
        shares = ", ".join(f"{100 * row['attention_flops']['value']:.0f}" for row in (image, video))
        cells = [cell for row in (image, video) for cell in (_psnr(row), _followed(row))]
        lines.append([shown, shares, *cells])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _psnr(row: dict[str, Any]) -> str:
    return _interval(row["psnr"], 1.0, 1) if row["psnr"] else ""


def _followed(row: dict[str, Any]) -> str:
    return _interval(row["verifier"]["whole"], 100.0, 0)


def _interval(estimate: dict[str, Any], factor: float, digits: int) -> str:
    low, high = (factor * value for value in estimate["ci95"])
    return f"{factor * estimate['value']:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


PAGES = {"README.md": False, "docs/results.md": True}


def shown(page: str) -> str:
    """Return the table that a page shows now."""
    text = (ROOT / page).read_text()
    return text[text.index(BEGIN) + len(BEGIN) : text.index(END)].strip()


def main() -> None:
    """Write the tables between their marks."""
    for page, full in PAGES.items():
        text = (ROOT / page).read_text()
        start, stop = text.index(BEGIN) + len(BEGIN), text.index(END)
        (ROOT / page).write_text(text[:start] + "\n" + table(full) + "\n" + text[stop:])


if __name__ == "__main__":
    main()
