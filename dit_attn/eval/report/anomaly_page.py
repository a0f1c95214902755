"""The page of generated image-mask pairs: counts and controls, accepted and rejected images with their masks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dit_attn.eval.report.media_source import file_address
from dit_attn.eval.report.render import render
from dit_attn.eval.report.table import Table

MOST = 48  # images of each kind on the page


def page(folder: Path, rows: Sequence[dict[str, Any]], summary: dict[str, Any], command: str = "") -> str:
    """Render ``index.html``.

    Args:
        folder: of the run.
        rows: of ``manifest.jsonl``.
        summary: ``summary.json``.
        command: that made them.
    """
    first: dict[str, Any] = rows[0] if rows else {"model": "", "config": {}}
    groups = {name: [row for row in rows if row["decision"] == name] for name in ("accepted", "rejected")}
    return render(
        "anomaly_page.html",
        title=f"{len(groups['accepted'])} image-mask pairs",
        about=f"{len(groups['rejected'])} attempts were rejected and are not among them.",
        counts=counts_table(summary),
        controls=controls_table(summary),
        command=command or "AnomalyGenerator(pipe, concept).run(...)",
        facts=[("model", first["model"] or "-"), *first["config"].items()],
        groups=[
            {"name": name, "count": len(found), "images": [_shown(folder, row) for row in found[:MOST]]}
            for name, found in groups.items()
        ],
    )


def counts_table(summary: dict[str, Any]) -> Table:
    """Tabulate what was made, by product and defect."""
    head = ("defect", "wanted", "accepted", "rejected", "ratio", "fill", "leak", "accepted from ratio")
    rows = [
        (name, one["wanted"], one["accepted"], one["rejected"], *(_figure(one, k) for k in ("ratio", "fill", "leak")),
         _figure(one, "threshold"))
        for name, one in summary["pairs"].items()
    ]  # fmt: skip
    return Table("pairs by defect", head, rows)


def controls_table(summary: dict[str, Any]) -> Table:
    """Tabulate what the gate says of images without any defect."""
    head = ("defect", "normal image under a mask: ratio", "95 % below", "painted with the normal prompt: ratio", "fill",
            "accepted")  # fmt: skip
    rows = []
    for name, one in summary["pairs"].items():
        plain, painted = one.get("normal_under_mask", {}), summary.get("controls", {}).get(name, {})
        accepted = f"{painted['accepted']} of {painted['count']}" if painted else "-"
        rows.append((name, _figure(plain, "mean"), _figure(plain, "q95"), _figure(painted, "ratio"),
                     _figure(painted, "fill"), accepted))  # fmt: skip
    return Table("controls", head, rows)


def _figure(values: dict[str, Any], key: str) -> str:
    return f"{values[key]:.2f}" if key in values else "-"


def _shown(folder: Path, row: dict[str, Any]) -> dict[str, str]:
    scores = ", ".join(f"{key} {row['scores'][key]:.2f}" for key in ("ratio", "fill") if key in row["scores"])
    return {
        "src": file_address(folder / row["generated"]),
        "mask": file_address(folder / row["mask_file"]),
        "label": f"{row['product']}+{row['defect']} {row['number']}",
        "note": row["reason"] or scores,
    }
