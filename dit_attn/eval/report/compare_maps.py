"""The section "Layer by step" of the comparison page: density and error of every method, each on one color scale."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dit_attn.eval.report.heatmap import HeatMap, heat_map, known, round_up
from dit_attn.eval.report.table import Table

KINDS = {
    "density": ("Attention computed", "fraction of dense, 1 is dense"),
    "error": ("Error of the result", "relative L2 distance to dense attention, 0 is exact"),
}


def map_section(maps: dict[str, dict[str, Any]], results: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Collect what the template draws; ``None`` without maps.

    Args:
        maps: by label, as ``results.json`` has them: ``layers``, ``density`` and ``error`` (layers x steps), ``rows``,
            ``seconds``; or ``failed``.
        results: the items of ``results.json``, for the time of the same item without measuring.
    """
    if not maps:
        return None
    drawn = {label: one for label, one in maps.items() if "failed" not in one and one["layers"]}
    absent = [
        f"No map of {label}: {one.get('failed', 'no attention call was recorded')}."
        for label, one in maps.items()
        if label not in drawn
    ]
    if not drawn:
        return {"about": "", "kinds": [], "numbers": None, "absent": absent}
    first = next(iter(drawn.values()))
    errors = [value for one in drawn.values() for value in known(one["error"])]
    tops = {"density": 1.0, "error": round_up(max(errors, default=0.0))}
    about = (
        f"One item ({first['prompt']}, seed {first['seed']}): rows are layers, columns are denoising steps, both from "
        f"first to last. The error is measured on at most {first['rows']} query rows of every call. "
        f"{overhead(drawn, results)} Point at a cell, touch it, or move with the arrow keys to see its number at the "
        "bottom."
    )
    kinds = [
        {
            "title": KINDS[kind][0],
            "meaning": KINDS[kind][1],
            "top": f"{top:g}",
            "maps": [_panel(label, kind, one, top) for label, one in drawn.items()],
        }
        for kind, top in tops.items()
    ]
    return {"about": about, "kinds": kinds, "numbers": numbers(drawn), "absent": absent}


def overhead(maps: dict[str, dict[str, Any]], results: Sequence[dict[str, Any]]) -> str:
    """Say what measuring the maps cost."""
    plain = {item["variant"]: item["seconds"] for item in reversed(results) if item["error"] is None}
    both = [(one["seconds"], plain[label]) for label, one in maps.items() if plain.get(label)]
    if not both:
        return "These runs are not timed."
    measured, timed = (sum(part) for part in zip(*both, strict=True))
    return (
        f"These runs are extra and not timed: {measured / len(both):.1f} s an item with measuring, "
        f"{timed / len(both):.1f} s without."
    )


def numbers(maps: dict[str, dict[str, Any]]) -> Table:
    """Build the same as a table: means over the steps, a row a layer."""
    head = ["layer", *(f"{label}: {kind}" for label in maps for kind in KINDS)]
    names = dict.fromkeys(name for one in maps.values() for name in one["layers"])
    rows = []
    for name in names:
        cells = [name]
        for one in maps.values():
            place = one["layers"].index(name) if name in one["layers"] else None
            for kind in KINDS:
                values = [] if place is None else list(known([one[kind][place]]))
                cells.append(f"{sum(values) / len(values):.3f}" if values else "-")
        rows.append(cells)
    return Table("density and error of every layer", head, rows)


def _panel(label: str, kind: str, one: dict[str, Any], top: float) -> HeatMap:
    steps = [f"step {i + 1}" for i in range(one["steps"])]
    return heat_map(one[kind], one["layers"], steps, label, scale=(0.0, top), label=f"{KINDS[kind][0]}, {label}")
