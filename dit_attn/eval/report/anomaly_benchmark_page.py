"""The page of a benchmark of image-mask pairs: what a segmenter learned from each arm, what loses, and the controls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dit_attn.eval.report.digits import write_figure
from dit_attn.eval.report.render import render
from dit_attn.eval.report.table import Cell, Table

METRICS = {"pixel_ap": "pixel AP", "pro": "PRO", "pixel_auroc": "pixel AUROC", "image_auroc": "image AUROC"}
"""Headings of the scores."""
_TRACES = ("untouched", "decoded", "painted")


def page(record: dict[str, Any]) -> str:
    """Render ``index.html`` from ``results.json``."""
    table = record["table"]
    groups = list(dict.fromkeys(row["group"] for row in table))
    facts = [("model", record["model"]["name"]), ("commit", record["commit"] or "-")]
    facts += [("seconds per part", ", ".join(f"{k} {v:.1f}" for k, v in record["seconds"].items()) or "-")]
    return render(
        "anomaly_benchmark_page.html",
        title="What a segmenter learns from the pairs",
        about=f"{len(record['measurements'])} segmenters were trained, each with the same number of steps.",
        said=record["said"],
        rule=record["rule"],
        groups=[
            {"name": name, "scores": scores_table(own), "traces": traces_table(own)}
            for name in groups
            for own in [[row for row in table if row["group"] == name]]
        ],
        command=record["command"],
        facts=facts,
    )


def scores_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Tabulate scores by arm and number of shots, with differences in pixel AP."""
    head = ("arm", "real shots", *METRICS.values(), "pixel AP over the shots alone", "over crop-and-paste", "pairs")
    body = [
        (row["arm"], row["shots"], *(_cell(row["scores"][name]) for name in METRICS),
         _cell(_against(row, "none"), "+"), _cell(_against(row, "crop-paste"), "+"),
         write_figure(row.get("accepted"))[0])
        for row in rows
    ]  # fmt: skip
    return Table("scores by arm", head, body)


def traces_table(rows: Sequence[dict[str, Any]]) -> Table | None:
    """Tabulate what segmenters say of normal images that carry the traces of the model; ``None`` without them."""
    own = [row for row in rows if "traces" in row]
    head = ("arm", "real shots", *_TRACES)
    body = [(row["arm"], row["shots"], *(_cell(row["traces"][name]) for name in _TRACES)) for row in own]
    return Table("pixel AUROC of normal images", head, body) if own else None


def change(row: dict[str, Any], base: str) -> str:
    """Write an arm's paired difference in pixel AP to another arm with its interval, ``"-"`` for none."""
    value, interval = write_figure(_against(row, base), "+")
    return f"{value} ({interval})" if interval else value


def _against(row: dict[str, Any], base: str) -> dict[str, Any] | None:
    return row["against"].get(base, {}).get("pixel_ap")


def _cell(figure: dict[str, Any] | None, sign: str = "") -> Cell:
    value, interval = write_figure(figure, sign)
    return Cell(value, note=interval)
