"""The table of the sparse methods, made from the records: ``python -m tests._support.result_tables`` writes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BEGIN, END = "<!-- comparison: begin -->", "<!-- comparison: end -->"
RECORDS = ("benchmarks/readers/tiny-image.json", "benchmarks/readers/tiny-video.json")
PAGE = "docs/results.md"


def table() -> str:
    """Return the Markdown table of every row of the records."""
    found = rows()
    shown = {label: "dense" if label == "dense" else f"`{label}`" for label in found[0]}
    head = ["", "attention computed, % of dense", "images: PSNR to dense, dB", "prompt followed, %"]
    head += ["videos: PSNR to dense, dB", "prompt followed, %"]
    lines = [head, ["---"] * len(head)]
    for label, title in shown.items():
        image, video = (record[label] for record in found)
        shares = ", ".join(f"{100 * row['attention_flops']['value']:.0f}" for row in (image, video))
        cells = [cell for row in (image, video) for cell in (_psnr(row), _followed(row))]
        lines.append([title, shares, *cells])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def rows() -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the rows of the image and of the video record by label."""
    image, video = (json.loads((ROOT / name).read_text())["headline"] for name in RECORDS)
    return {row["label"]: row for row in image}, {row["label"]: row for row in video}


def _psnr(row: dict[str, Any]) -> str:
    return _interval(row["psnr"], 1.0, 1) if row["psnr"] else ""


def _followed(row: dict[str, Any]) -> str:
    return _interval(row["verifier"]["whole"], 100.0, 0)


def _interval(estimate: dict[str, Any], factor: float, digits: int) -> str:
    low, high = (factor * value for value in estimate["ci95"])
    return f"{factor * estimate['value']:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def current() -> str:
    """Return the table that the page shows now."""
    text = (ROOT / PAGE).read_text()
    return text[text.index(BEGIN) + len(BEGIN) : text.index(END)].strip()


def main() -> None:
    """Write the table between its marks."""
    text = (ROOT / PAGE).read_text()
    start, stop = text.index(BEGIN) + len(BEGIN), text.index(END)
    (ROOT / PAGE).write_text(text[:start] + "\n" + table() + "\n" + text[stop:])


if __name__ == "__main__":
    main()
