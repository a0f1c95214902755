"""The page of pictures with subjects: their boxes, how much they attend to each other, and what SaaS measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dit_attn.eval.report.media_source import file_address, is_video
from dit_attn.eval.report.render import render

Side = Mapping[str, Any]
"""What is written next to an item: its ``prompt``, ``file``, ``methods`` and ``summary``."""


@dataclass(frozen=True)
class Box:
    """A box over a picture, in % of its width and height."""

    piece: str
    left: float
    top: float
    width: float
    height: float


@dataclass(frozen=True)
class Row:
    """A row of a table."""

    name: str
    cells: Sequence[str]


@dataclass(frozen=True)
class SubjectTable:
    """Numbers about the subjects of one picture."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Row]


@dataclass(frozen=True)
class SubjectItem:
    """One picture; ``address`` is its data address."""

    prompt: str
    address: str
    video: bool
    boxes: Sequence[Box]
    tables: Sequence[SubjectTable] = field(default_factory=list)


def page(folder: Path, sides: Sequence[Side], title: str, command: str, facts: Sequence[tuple[str, str]]) -> str:
    """Render the page.

    Args:
        folder: where the files of the items are.
        sides: what is known of every item.
        title: of the page.
        command: that made the items.
        facts: name and value, for the end of the page.
    """
    about = "Boxes are those of the subjects, or around the regions that were found for them."
    return render(
        "subjects_page.html", title=title, about=about, items=[item(folder, side) for side in sides], command=command,
        facts=list(facts),
    )  # fmt: skip


def item(folder: Path, side: Side) -> SubjectItem:
    """Return what the page shows of an item."""
    path = folder / side["file"]
    reports = (side.get("summary") or {}).get("reports") or {}
    return SubjectItem(side["prompt"], file_address(path), is_video(path), boxes(side, reports), tables(reports))


def boxes(side: Side, reports: Mapping[str, Any]) -> list[Box]:
    """Return the boxes of the subjects that an item's methods were given, and of those that were found."""
    given = [
        (str(subject["piece"]), box)
        for method in side.get("methods") or ()
        if isinstance(method.get("subjects"), list)
        for subject in method["subjects"]
        for box in subject.get("boxes", [subject["box"]] if subject.get("box") else [])
    ]
    found = [(one["piece"], one["box"]) for one in (reports.get("isolation") or {}).get("found", ()) if one["box"]]
    return [
        Box(piece, *(round(100 * x, 2) for x in (left, top, right - left, bottom - top)))
        for piece, (left, top, right, bottom) in dict.fromkeys((piece, tuple(box)) for piece, box in [*given, *found])
    ]


def tables(reports: Mapping[str, Any]) -> list[SubjectTable]:
    """Return the leakage of isolation, and what SaaS measured of every piece."""
    shown = []
    isolation = reports.get("isolation") or {}
    names = [f"{at}" for at, _ in enumerate(isolation.get("pieces", ()), 1)]
    for what, count in zip(("word", "region"), isolation.get("counts", (0, 0))):
        if count:
            matrix = isolation[f"{what}_sums"]
            rows = [
                Row(f"{at} {piece}", [f"{100 * x / count:.2f} %" for x in row])
                for at, (piece, row) in enumerate(zip(isolation["pieces"], matrix), 1)
            ]
            shown.append(SubjectTable(f"attention of a region to the {what}s of subject", names, rows))
    traces = (reports.get("saas") or {}).get("traces", ())
    if traces:
        columns = {"shares": "share", "rivals": "rival", "factors": "factor", "quality": "quality"}
        rows = [Row(one["piece"], [_mean(one[name]) for name in columns]) for one in traces]
        shown.append(SubjectTable("pieces of the prompt, means over the steps", list(columns.values()), rows))
    return shown


def _mean(values: Sequence[float]) -> str:
    return f"{sum(values) / max(1, len(values)):.3g}"
