"""What ``dit-attn anomaly generate`` writes and prints when its pairs are made."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dit_attn import files
from dit_attn.cli.options import Options
from dit_attn.pipelines.anomaly.exports import Pair, export
from dit_attn.pipelines.anomaly.pixels import read_mask


def export_pairs(
    output: Path, rows: list[dict[str, Any]], formats: Sequence[str], normals: Mapping[str, Sequence[Path]]
) -> None:
    """Write the accepted pairs in the formats."""
    pairs = []
    for row in rows:
        if row["decision"] == "accepted":
            image, mask = output / row["generated"], output / row["mask_file"]
            kept = {key: row[key] for key in ("product", "defect", "number", "seed", "concept", "source_image",
                                              "scores", "model", "licence")}  # fmt: skip
            pairs.append(Pair(image, read_mask(mask, image), row["product"], row["defect"], kept))
    pairs.sort(key=lambda pair: (pair.product, pair.defect, pair.row["number"]))
    for name in formats:
        export(output, name, pairs, normals)


def write_pages(output: Path, rows: list[dict[str, Any]], summary: dict[str, Any], command: str) -> None:
    """Write the contact sheet and the page."""
    from dit_attn.cli import outputs
    from dit_attn.eval.report.anomaly_page import page
    from dit_attn.pipelines.anomaly.sheet import contact_sheet

    shown = [row for row in rows if row["decision"] == "accepted"][:48]
    if shown:
        outputs.write_image(contact_sheet(output, shown), output / "sheet.png")
    files.write_text(output / "index.html", page(output, rows, summary, command))


def count_missing(summary: dict[str, Any]) -> int:
    """Return how many pairs are missing after their retries."""
    return sum(one["missing"] for one in summary["pairs"].values())


def report(options: Options, output: Path, summary: dict[str, Any], formats: Sequence[str]) -> int:
    """Print what was made; return the exit code."""
    missing = count_missing(summary)
    if options.get("json"):
        print(json.dumps({"output": str(output), "formats": list(formats), **summary}, indent=1))
        return 1 if missing else 0
    for name, one in summary["pairs"].items():
        found = ", ".join(f"{key} {one[key]:.2f}" for key in ("ratio", "fill", "leak") if key in one)
        figures = f"; {found}" if found else ""
        print(f"{name}: {one['accepted']} of {one['wanted']} pairs, {one['rejected']} rejected{figures}")
        control = summary["controls"].get(name)
        if control:
            print(f"  control, prompt of the normal product: {control['accepted']} of {control['count']} accepted, "
                  f"ratio {control['ratio']:.2f}, fill {control['fill']:.2f}")  # fmt: skip
    print(f"written to {output}: {', '.join(formats)}, index.html")
    if missing:
        print(f"{missing} pairs are missing after their retries; give more --retries or another --guidance-scale")
    return 1 if missing else 0
