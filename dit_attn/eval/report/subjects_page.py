"""The page of pictures with subjects: their boxes, how much they attend to each other, and what SaaS measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dit_attn.eval.report.heatmap import HeatMap, heat_map, rgb
from dit_attn.eval.report.media_source import file_address, is_video
from dit_attn.eval.report.plot import Plot
from dit_attn.eval.report.render import render
from dit_attn.remote import Place

_PLOTS = (
    ("share of the attention", "shares", "rivals"),
    ("factor of the next step", "factors", "wanted"),
    ("quality of the region", "quality", ""),
)  # title, values, dotted values
Side = Mapping[str, Any]
"""What is written next to an item: its ``prompt``, ``file`` and ``summary``; and ``boxes``, pieces with their boxes."""


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
    """One picture; ``address`` is its data address, ``colors`` those of the pieces in its plots."""

    prompt: str
    address: str
    video: bool
    boxes: Sequence[Box]
    tables: Sequence[SubjectTable] = field(default_factory=list)
    maps: Sequence[HeatMap] = field(default_factory=list)
    plots: Sequence[Plot] = field(default_factory=list)
    colors: Sequence[tuple[str, str]] = field(default_factory=list)


def page(folder: Place, sides: Sequence[Side], title: str, command: str, facts: Sequence[tuple[str, str]]) -> str:
    """Render the page.

    Args:
        folder: where the files of the items are.
        sides: what is known of every item.
        title: of the page.
        command: that made the items.
        facts: name and value, for the end of the page.
    """
    about = "Boxes are those of the subjects, or around the regions found for them or for pieces of the prompt."
    return render(
        "subjects_page.html", title=title, about=about, items=[item(folder, side) for side in sides], command=command,
        facts=list(facts),
    )  # fmt: skip


def item(folder: Place, side: Side) -> SubjectItem:
    """Return what the page shows of an item."""
    path = folder / side["file"]
    reports = (side.get("summary") or {}).get("reports") or {}
    traces = (reports.get("saas") or {}).get("traces", ())
    return SubjectItem(
        side["prompt"], file_address(path), is_video(path), boxes(side, reports), tables(reports), maps(reports),
        [plot(traces, *what) for what in _PLOTS] if traces else [],
        [(one["piece"], color(at, len(traces))) for at, one in enumerate(traces)],
    )  # fmt: skip


def boxes(side: Side, reports: Mapping[str, Any]) -> list[Box]:
    """Return the boxes of the subjects that an item's methods were given, and of those that were found.

    Without either, those around the regions of SaaS's pieces at its last step.
    """
    given = [(piece, box) for piece, box in side.get("boxes", ())]
    found = list((reports.get("isolation") or {}).get("found", ()))
    measured = [*found, *(() if given or found else (reports.get("saas") or {}).get("traces", ()))]
    found = [(one["piece"], one["box"]) for one in measured if one["box"]]
    return [
        Box(piece, *(round(100 * x, 2) for x in (left, top, right - left, bottom - top)))
        for piece, (left, top, right, bottom) in dict.fromkeys((piece, tuple(box)) for piece, box in [*given, *found])
    ]


def maps(reports: Mapping[str, Any]) -> list[HeatMap]:
    """Return the leakage of isolation as heat maps: rows are regions, columns what they attend to."""
    isolation = reports.get("isolation") or {}
    names = [f"{at} {piece}" for at, piece in enumerate(isolation.get("pieces", ()), 1)]
    return [
        heat_map([[x / count for x in row] for row in isolation[f"{what}_sums"]], names, names,
                 f"leakage to {what}s", "share of a region's attention")
        for what, count in zip(("word", "region"), isolation.get("counts", (0, 0)))
        if count
    ]  # fmt: skip


def color(at: int, count: int) -> str:
    """Return the color of one of several pieces."""
    return rgb(0.15 + 0.75 * at / max(1, count - 1))


def plot(traces: Sequence[Mapping[str, Any]], title: str, name: str, dotted: str) -> Plot:
    """Draw what SaaS measured of every piece, step by step.

    Args:
        traces: one of every piece.
        title: of the vertical axis.
        name, dotted: the values that are drawn as a line, and as a dotted one.
    """
    values = [x for one in traces for x in (*one[name], *one.get(dotted, ()))]
    steps = [x for one in traces for x in one["steps"]]
    ends = (float(min(steps, default=0)), float(max(steps, default=1)))
    drawn = Plot(f"{title} of every piece over the steps", ends, (0.0, 1.05 * max(values, default=1.0) or 1.0), "step",
                 title, height=220)  # fmt: skip
    drawn.ticks(lambda x: f"{x:g}", lambda y: f"{y:.3g}")
    for at, one in enumerate(traces):
        for key, kind in ((name, "share"), (dotted, "rival")):
            line = list(zip(map(float, one["steps"]), one.get(key, ())))
            if line:
                drawn.line(line, kind, color(at, len(traces)))
        for step, value in zip(one["steps"], one[name]):
            drawn.point(step, value, "share", color(at, len(traces)), f"{one['piece']}, step {step}: {value:.3g}")
    return drawn


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
