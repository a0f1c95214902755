"""The page of a comparison of methods: figures, quality against speed, outputs next to each other, and maps."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dit_attn.eval.report.compare_maps import map_section
from dit_attn.eval.report.metric_labels import COLUMNS as METRICS
from dit_attn.eval.report.plot import Plot
from dit_attn.eval.report.render import render
from dit_attn.eval.report.table import Cell, Table

TYPES = {".png": "image/png", ".jpg": "image/jpeg", ".webp": "image/webp", ".mp4": "video/mp4"}
LARGEST = 24 << 20  # bytes of images and videos that are put into the page; beyond that it links to the files
COLORS = ("#555f6b", "#1f6fb4", "#c2551b", "#2c8a4b", "#8a3fa0", "#a88400", "#b0305c", "#267f86")


def page(results: dict[str, Any], folder: Path, show: int = 24) -> str:
    """Render ``report.html`` of a comparison.

    Args:
        results: ``results.json`` of ``dit-attn compare``.
        folder: where the files named in it are.
        show: items on the page at most.
    """
    items = shown_items(results, folder, show)
    rows = results["headline"]
    labels = [row["label"] for row in rows]
    return render(
        "compare_page.html",
        title=f"{results['model']['model']}: methods compared with dense attention",
        about=about(results),
        sentences=sentences(rows),
        table=table(rows),
        notes=notes(rows),
        plot=quality_plot(rows),
        key=[(color(i), label) for i, label in enumerate(labels)],
        maps=map_section(results["maps"], results["takes"]),
        missing=missing(results, len(items)),
        command=results["command"],
        facts={**results["environment"], **results["versions"], "commit": results["commit"]}.items(),
        data={"labels": labels, "items": items},
    )


def shown_items(results: dict[str, Any], folder: Path, show: int) -> list[dict[str, Any]]:
    """Collect the first items: prompt, seed, and by label the source, kind and verdict of each file."""
    items: dict[int, dict[str, Any]] = {}
    for result in results["takes"]:
        item = items.setdefault(result["index"], {"prompt": result["prompt"], "seed": result["seed"], "files": {}})
        if result["file"] is not None and result["error"] is None:
            wrong = [name for name, right in (result["verdict"] or {}).items() if not right]
            judged = result["verdict"] is not None
            item["files"][result["variant"]] = {"file": result["file"], "wrong": wrong, "judged": judged}
    chosen = [items[index] for index in sorted(items)[:show]]
    files = [entry for item in chosen for entry in item["files"].values()]
    inside = sum((folder / entry["file"]).stat().st_size for entry in files) <= LARGEST
    for entry in files:
        path = folder / entry.pop("file")
        kind = TYPES.get(path.suffix.lower(), "image/png")
        entry["video"] = kind.startswith("video")
        link = path.relative_to(folder).as_posix()
        entry["src"] = f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}" if inside else link
    return chosen


def color(i: int) -> str:
    """Return the color of method ``i``."""
    return COLORS[i % len(COLORS)]


# -- words -------------------------------------------------------------------------------------------------------------


def about(results: dict[str, Any]) -> str:
    """Say in one line what ran where."""
    place = results["environment"]
    count, device = results["items"], results["device"]
    prompts = f"{results['prompts']} prompt" + ("s" if results["prompts"] != 1 else "")
    return (
        f"{count} item{'s' if count != 1 else ''}, the same prompts and noise for every method, in turns, on "
        f"{place.get('hardware', device)} ({device}). Intervals are 95 %, from resampling the {prompts}."
    )


def sentences(rows: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """Say what the figures mean: (label, rest of the sentence) of every method but dense."""
    found = []
    for row in rows[1:]:
        parts = []
        if row["speedup"]:
            ratio = row["speedup"]["value"]
            speed = f"is {ratio:.2f}x as fast as dense" if ratio >= 1 else f"is slower than dense ({ratio:.2f}x)"
            parts.append(speed + _unsure(row["speedup"], 1.0))
        if row["attention_flops"]:
            parts.append(f"computes {row['attention_flops']['value']:.0%} of the attention")
        change = (row["verifier"] or {}).get("change")
        if change:
            points = 100 * change["value"]
            more = "more" if points > 0 else "less"
            word = "as often as" if abs(points) < 0.05 else f"{abs(points):.0f} points {more} often than"
            parts.append(f"follows the prompt {word} dense{_unsure(change, 0.0)}")
        elif row["ssim"]:
            parts.append(f"has a similarity (SSIM) of {row['ssim']['value']:.3f} to dense")
        *first, last = parts or ["has no figures"]
        found.append((row["label"], f"{', '.join(first)}{' and ' if first else ''}{last}."))
    return found


def _unsure(figure: dict[str, Any], neutral: float) -> str:
    interval = figure["ci95"]
    if interval is None:
        return " (one prompt: no interval)"
    return " (within the noise)" if interval[0] <= neutral <= interval[1] else ""


def missing(results: dict[str, Any], shown: int) -> str:
    """Say what the page does not show."""
    failed = sum(result["error"] is not None for result in results["takes"])
    parts = []
    if shown < results["items"]:
        parts.append(f"{shown} of {results['items']} items are shown; all are in the folder.")
    if failed:
        parts.append(f"{failed} files could not be made; results.json says why.")
    return " ".join(parts)


# -- table and plot ----------------------------------------------------------------------------------------------------

COLUMNS = (
    ("seconds per item", "seconds", 1.0, "{:.2f}"),
    ("speed-up", "speedup", 1.0, "{:.2f}x"),
    ("attention computed, % of dense", "attention_flops", 100.0, "{:.0f} %"),
    ("prompt followed (verifier)", "verifier.whole", 100.0, "{:.0f} %"),
    ("attributes right", "verifier.attributes", 100.0, "{:.0f} %"),
    ("equivalent guidance scale", "parallel", 1.0, "{:+.2f}"),
    ("orthogonal component", "sideways", 1.0, "{:.2f}"),
    ("color saturation", "saturation", 1.0, "{:.3f}"),
    ("PSNR to dense, dB", "psnr", 1.0, "{:.1f}"),
    ("SSIM to dense", "ssim", 1.0, "{:.3f}"),
    *((metric.title, f"metrics.{name}", 1.0, f"{{:.{metric.digits}f}}") for name, metric in METRICS.items()),
    ("temporal consistency", "temporal", 1.0, "{:.3f}"),
)
LOWER = {metric.title for metric in METRICS.values() if metric.better == "lower"} | {"seconds per item"}


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """Build the table of figures; columns without a figure are left out."""
    columns = [column for column in COLUMNS if any(_figure(row, column[1]) for row in rows)]
    head = [Cell(title, "lower is better" if title in LOWER else "") for title, *_ in columns]
    body = [
        [Cell(row["label"], dot=color(i)), *(_cell(_figure(row, key), scale, form) for _, key, scale, form in columns)]
        for i, row in enumerate(rows)
    ]
    return Table("table of figures", ["method", *head], body)


def notes(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Say what a reader of the figures must know, once each: why there is no figure, how many samples, biases."""
    found: dict[str, None] = {}
    for row in rows:
        for name, figure in row["metrics"].items():
            title, count = METRICS[name].title, figure["n"]
            if figure["value"] is None and row is not rows[0]:
                found[f"{title}, {row['label']}: no figure: {figure['why']}."] = None
            elif figure["value"] is not None:
                more = f"; {figure['caution']}" if figure.get("caution") else ""
                found[f"{title}: {figure['label']}, {count} item{'s' if count != 1 else ''}{more}."] = None
    if any(row.get("parallel") for row in rows):
        found[
            "Equivalent guidance scale: what the guidance update of the method adds to the scale of classifier-free "
            "guidance. Orthogonal component: the rest of the update, in units of |c - u|, the distance of the "
            "conditional and the unconditional prediction."
        ] = None
    if any(row.get("temporal") for row in rows):
        found["Temporal consistency: 1 moves evenly, below 0 flickers; compare with dense."] = None
    return list(found)


def _figure(row: dict[str, Any], key: str) -> dict[str, Any] | None:
    found: Any = row
    for part in key.split("."):
        found = None if found is None else found.get(part)
    return found


def _cell(figure: dict[str, Any] | None, scale: float, form: str) -> Cell:
    if figure is None or figure["value"] is None:
        return Cell("-", hint="not applicable" if figure is None else figure["why"])
    text, note = form.format(scale * figure["value"]), ""
    if figure["ci95"] and figure["ci95"][0] < figure["ci95"][1]:
        note = " to ".join(form.format(scale * x).split(" ")[0] for x in figure["ci95"])
    return Cell(text, note)


def quality_plot(rows: Sequence[dict[str, Any]]) -> Plot | None:
    """Plot quality against speed; quality is the verifier's where prompts can be judged, else SSIM."""
    judged = any(_figure(row, "verifier.whole") for row in rows)
    key, title, digits = ("verifier.whole", "prompt followed", "0%") if judged else ("ssim", "SSIM to dense", "3f")
    points = []
    for i, row in enumerate(rows):
        quality = _figure(row, key)
        if row["speedup"] and quality:
            points.append((color(i), row["label"], row["speedup"], quality))
    if not points:
        return None
    xs = [x for *_, speed, _ in points for x in (speed["ci95"] or [speed["value"]])]
    ys = [y for *_, quality in points for y in (quality["ci95"] or [quality["value"]])]
    low, high = min(ys), max(ys)
    room = 0.08 * (high - low or 0.1)
    plot = Plot(
        f"{title} against speed-up, one point a method",
        (min(0.9, *xs), max(1.1, *xs)),
        (max(0.0, low - room), min(1.0, high + room)),  # both qualities lie in [0, 1]
        "speed-up over dense",
        title,
    )
    plot.ticks("{:.2f}x".format, f"{{:.{digits}}}".format)
    for shade, label, speed, quality in points:
        if speed["ci95"]:
            plot.line([(end, quality["value"]) for end in speed["ci95"]], "bar", shade)
        if quality["ci95"]:
            plot.line([(speed["value"], end) for end in quality["ci95"]], "bar", shade)
        plot.point(speed["value"], quality["value"], "method", shade, label)
    return plot
