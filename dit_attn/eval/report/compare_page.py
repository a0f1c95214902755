"""The page of a comparison: one file that needs no network, and that a person understands in a minute."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any

from dit_attn.eval.report.heatmap import heatmaps
from dit_attn.eval.report.metric_labels import COLUMNS as METRICS

TEMPLATE = Path(__file__).with_name("report.html")
TYPES = {".png": "image/png", ".jpg": "image/jpeg", ".webp": "image/webp", ".mp4": "video/mp4"}
LARGEST = 24 << 20  # bytes of media that are put into the page; beyond that it links to the files beside it
COLORS = ("#555f6b", "#1f6fb4", "#c2551b", "#2c8a4b", "#8a3fa0", "#a88400", "#b0305c", "#267f86")


def page(results: dict[str, Any], folder: Path, show: int = 24) -> str:
    """``report.html`` of the folder of a comparison.

    Args:
        results: ``results.json`` of ``dit-attn compare``.
        folder: where the files named in it lie.
        show: items on the page at most.
    """
    items = shown_items(results, folder, show)
    rows = results["headline"]
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=html.escape(f"{results['model']['model']}: methods beside dense"),
        summary="".join(f"<li>{sentence}</li>" for sentence in sentences(rows)),
        about=html.escape(about(results)),
        table=table(rows),
        notes=notes(rows),
        plot=pareto(rows),
        key=" ".join(f"<span>{_dot(i)}{html.escape(row['label'])}</span>" for i, row in enumerate(rows)),
        maps=heatmaps(results["maps"], results["takes"]),
        missing=html.escape(missing(results, len(items))),
        command=html.escape(results["command"]),
        versions="".join(
            f"<dt>{html.escape(str(key))}</dt><dd>{html.escape(str(value))}</dd>"
            for key, value in {**results["environment"], **results["versions"], "commit": results["commit"]}.items()
        ),
        data=json.dumps({"labels": [row["label"] for row in rows], "items": items}).replace("<", "\\u003c"),
    )


def shown_items(results: dict[str, Any], folder: Path, show: int) -> list[dict[str, Any]]:
    """The first items: prompt, seed, and by label the source, kind and verdict of each file."""
    items: dict[int, dict[str, Any]] = {}
    for take in results["takes"]:
        item = items.setdefault(take["index"], {"prompt": take["prompt"], "seed": take["seed"], "files": {}})
        if take["file"] is not None and take["error"] is None:
            wrong = [name for name, right in (take["verdict"] or {}).items() if not right]
            judged = take["verdict"] is not None
            item["files"][take["variant"]] = {"file": take["file"], "wrong": wrong, "judged": judged}
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


# -- words -------------------------------------------------------------------------------------------------------------


def about(results: dict[str, Any]) -> str:
    """One line: what ran where."""
    place = results["environment"]
    count, device = results["items"], results["device"]
    prompts = f"{results['prompts']} prompt" + ("s" if results["prompts"] != 1 else "")
    return (
        f"{count} item{'s' if count != 1 else ''}, the same prompts and noise for everyone, in turns, on "
        f"{place.get('hardware', device)} ({device}). Intervals are 95 %, from resampling the {prompts}."
    )


def sentences(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What the figures say, one sentence a method, as HTML."""
    found = []
    for row in rows[1:]:
        name = f"<b>{html.escape(row['label'])}</b>"
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
            parts.append(f"meets the prompt {word} dense{_unsure(change, 0.0)}")
        elif row["ssim"]:
            parts.append(f"has a similarity (SSIM) of {row['ssim']['value']:.3f} to dense")
        *first, last = parts or ["has no figures"]
        found.append(f"{name} {', '.join(first)}{' and ' if first else ''}{last}.")
    return found


def _unsure(figure: dict[str, Any], neutral: float) -> str:
    interval = figure["ci95"]
    if interval is None:
        return " (one prompt: no interval)"
    return " (within the noise)" if interval[0] <= neutral <= interval[1] else ""


def missing(results: dict[str, Any], shown: int) -> str:
    """What the page does not show."""
    failed = sum(take["error"] is not None for take in results["takes"])
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
    ("attention computed", "attention_flops", 100.0, "{:.0f} %"),
    ("prompt met", "verifier.whole", 100.0, "{:.0f} %"),
    ("attributes right", "verifier.attributes", 100.0, "{:.0f} %"),
    ("push along guidance", "parallel", 1.0, "{:+.2f}"),
    ("push sideways", "sideways", 1.0, "{:.2f}"),
    ("strength of colors", "saturation", 1.0, "{:.3f}"),
    ("PSNR to dense, dB", "psnr", 1.0, "{:.1f}"),
    ("SSIM to dense", "ssim", 1.0, "{:.3f}"),
    *((metric.title, f"metrics.{name}", 1.0, f"{{:.{metric.digits}f}}") for name, metric in METRICS.items()),
    ("steadiness of motion", "temporal", 1.0, "{:.3f}"),
)
LOWER = {metric.title for metric in METRICS.values() if metric.better == "lower"} | {"seconds per item"}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Head and body of the table; columns without a figure are left out."""
    columns = [column for column in COLUMNS if any(_figure(row, column[1]) for row in rows)]
    head = "".join(f'<th scope="col">{title}{_better(title)}</th>' for title, *_ in columns)
    body = ""
    for i, row in enumerate(rows):
        cells = "".join(f"<td>{_cell(_figure(row, key), scale, form)}</td>" for _, key, scale, form in columns)
        body += f'<tr><th scope="row">{_dot(i)}{_breakable(row["label"])}</th>{cells}</tr>'
    return f'<thead><tr><th scope="col">method</th>{head}</tr></thead><tbody>{body}</tbody>'


def _breakable(label: str) -> str:
    """A label that a narrow column breaks between settings."""
    return html.escape(label).replace(",", ",<wbr>").replace(":", ":<wbr>")


def _dot(i: int) -> str:
    return f'<span class="dot" style="background:{COLORS[i % len(COLORS)]}"></span>'


def notes(rows: Sequence[dict[str, Any]]) -> str:
    """What a reader of the network metrics must know, once each: why there is no figure, how many samples, biases."""
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
            "Push along guidance: what the method adds to the scale of classifier-free guidance; sideways: the rest of "
            "its push, in lengths of conditional minus unconditional prediction."
        ] = None
    if any(row.get("temporal") for row in rows):
        found["Steadiness of motion: 1 moves evenly, below 0 flickers; compare with dense."] = None
    return "".join(f"<li>{html.escape(note)}</li>" for note in found)


def _better(title: str) -> str:
    return " <small>lower is better</small>" if title in LOWER else ""


def _figure(row: dict[str, Any], key: str) -> dict[str, Any] | None:
    found: Any = row
    for part in key.split("."):
        found = None if found is None else found.get(part)
    return found


def _cell(figure: dict[str, Any] | None, scale: float, form: str) -> str:
    if figure is None or figure["value"] is None:
        why = "not applicable" if figure is None else figure["why"]
        return f'<span class="none" title="{html.escape(why)}">-</span>'
    text = form.format(scale * figure["value"])
    if figure["ci95"] and figure["ci95"][0] < figure["ci95"][1]:
        low, high = (form.format(scale * x).split(" ")[0] for x in figure["ci95"])
        text += f' <small>{low} to {high}</small>'
    return text


def pareto(rows: Sequence[dict[str, Any]], width: int = 560, height: int = 300) -> str:
    """Quality against speed as inline SVG; quality is the verifier's where prompts can be judged, else SSIM."""
    judged = any(_figure(row, "verifier.whole") for row in rows)
    key, title, digits = ("verifier.whole", "prompt met", "0%") if judged else ("ssim", "SSIM to dense", "3f")
    points = []
    for i, row in enumerate(rows):
        quality = _figure(row, key)
        if row["speedup"] and quality:
            points.append((i, row, row["speedup"], quality))
    if not points:
        return "<p>No figures to draw.</p>"
    xs = [x for _, _, speed, _ in points for x in (speed["ci95"] or [speed["value"]])]
    ys = [y for _, _, _, q in points for y in (q["ci95"] or [q["value"]])]
    x0, x1, y0, y1 = min(0.9, *xs), max(1.1, *xs), min(ys), max(ys)
    room = 0.08 * (y1 - y0 or 0.1)
    y0, y1 = max(0.0, y0 - room), min(1.0, y1 + room)  # both qualities lie in [0, 1]
    left, bottom = 58, 44

    def at(x: float, y: float) -> tuple[float, float]:
        across = left + (x - x0) / (x1 - x0) * (width - left - 16)
        return across, height - bottom - (y - y0) / (y1 - y0) * (height - bottom - 12)

    parts = [
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{title} against speed-up, one point a method">',
        f'<path d="M{left},12V{height - bottom}H{width - 16}" class="axis"/>',
        f'<text x="{(left + width) / 2}" y="{height - 8}" text-anchor="middle">speed-up over dense</text>',
        f'<text transform="translate(14 {(height - bottom) / 2}) rotate(-90)" text-anchor="middle">{title}</text>',
    ]
    for step in range(5):
        x, y = x0 + (x1 - x0) * step / 4, y0 + (y1 - y0) * step / 4
        px, py = at(x, y)
        parts.append(f'<text x="{px:.1f}" y="{height - bottom + 16}" text-anchor="middle" class="tick">{x:.2f}x</text>')
        parts.append(f'<text x="{left - 6}" y="{py + 4:.1f}" text-anchor="end" class="tick">{y:.{digits}}</text>')
        parts.append(f'<path d="M{left},{py:.1f}H{width - 16}" class="grid"/>')
    for i, row, speed, quality in points:
        color = COLORS[i % len(COLORS)]
        px, py = at(speed["value"], quality["value"])
        for low, high, across in ((speed["ci95"], quality["value"], True), (quality["ci95"], speed["value"], False)):
            if low:
                ends = [at(end, high) if across else at(high, end) for end in low]
                line = "L".join(f"{a:.1f},{b:.1f}" for a, b in ends)
                parts.append(f'<path d="M{line}" stroke="{color}" class="bar"/>')
        label = html.escape(row["label"])
        parts.append(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="6" fill="{color}"><title>{label}</title></circle>')
    return "".join([*parts, "</svg>"])
