"""The page of a comparison of methods: what each is worth, outputs next to each other, figures, intervals and maps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import PurePath
from typing import Any

from dit_attn.eval.report.compare_maps import map_section
from dit_attn.eval.report.digits import decimals
from dit_attn.eval.report.estimates import Estimate
from dit_attn.eval.report.interval_plot import Axis, IntervalPlot, IntervalRow
from dit_attn.eval.report.media_source import file_address, is_video
from dit_attn.eval.report.metric_labels import COLUMNS as METRICS
from dit_attn.eval.report.render import chunks, render
from dit_attn.eval.report.table import Cell, Table
from dit_attn.eval.report.verdict import RULE, TOLERANCE, headline, quality_estimate, speed_estimate, verdicts
from dit_attn.remote import Place, size_of

LARGEST = 24 << 20  # bytes of images and videos that are put into the page; beyond that it links to the files
SHOWN_VERDICTS = 6  # the others are folded
COLORS = ("#77818d", "#1f6fb4", "#c2551b", "#2c8a4b", "#8a3fa0", "#a88400", "#b0305c", "#267f86")


def page(results: dict[str, Any], folder: Place, show: int = 24) -> str:
    """Render ``report.html`` of a comparison.

    Args:
        results: ``results.json`` of ``dit-attn compare``.
        folder: where the files named in it are.
        show: items on the page at most.
    """
    items = shown_items(results, folder, show)
    found = verdicts(results["headline"], results["prompts"])
    by_label = {row["label"]: row for row in results["headline"]}
    rows = [results["headline"][0], *(by_label[one.label] for one in found)]
    chips = {one.label: (one.kind, one.chip) for one in found}
    variants = [
        {"label": row["label"], "chunks": chunks(row["label"]), "chip": chips.get(row["label"], ("", ""))}
        for row in rows
    ]
    return render(
        "compare_page.html",
        title=f"{results['model']['model']}: methods compared with dense attention",
        about=about(results),
        headline=headline(found, results["prompts"], results.get("attention_share")),
        verdicts=found,
        shown=SHOWN_VERDICTS,
        rule=RULE,
        table=table(rows, MAIN),
        more=table(rows, MORE),
        notes=notes(rows),
        plot=interval_plot(rows, results["prompts"]),
        maps=map_section(results["maps"], results["takes"]),
        missing=missing(results, len(items)),
        command=results["command"],
        facts={**results["environment"], **results["versions"], "commit": results["commit"]}.items(),
        data={"variants": variants, "items": items},
    )


def shown_items(results: dict[str, Any], folder: Place, show: int) -> list[dict[str, Any]]:
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
    inside = sum(size_of(folder / entry["file"]) for entry in files) <= LARGEST
    for entry in files:
        file = entry.pop("file")
        path = folder / file
        entry["video"] = is_video(path)
        entry["src"] = file_address(path) if inside else PurePath(file).as_posix()
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

# Title, key, scale, form and the digits after the point at most.
Column = tuple[str, str, float, str, int]
MAIN: tuple[Column, ...] = (
    ("seconds per item", "seconds", 1.0, "{:.{places}f}", 2),
    ("speed-up", "speedup", 1.0, "{:.{places}f}x", 2),
    ("attention computed, % of dense", "attention_flops", 100.0, "{:.{places}f} %", 0),
    ("prompt followed (verifier)", "verifier.whole", 100.0, "{:.{places}f} %", 0),
    ("PSNR to dense, dB", "psnr", 1.0, "{:.{places}f}", 1),
    ("SSIM to dense", "ssim", 1.0, "{:.{places}f}", 3),
)
MORE: tuple[Column, ...] = (
    ("attributes right", "verifier.attributes", 100.0, "{:.{places}f} %", 0),
    ("equivalent guidance scale", "parallel", 1.0, "{:+.{places}f}", 2),
    ("orthogonal component", "sideways", 1.0, "{:.{places}f}", 2),
    ("color saturation", "saturation", 1.0, "{:.{places}f}", 3),
    *((metric.title, f"metrics.{name}", 1.0, "{:.{places}f}", metric.digits) for name, metric in METRICS.items()),
    ("temporal consistency", "temporal", 1.0, "{:.{places}f}", 3),
)
LOWER = {metric.title for metric in METRICS.values() if metric.better == "lower"} | {"seconds per item"}


def table(rows: Sequence[dict[str, Any]], columns: Sequence[Column]) -> Table | None:
    """Build a table of figures; columns without a figure are left out, ``None`` where nothing is left."""
    columns = [column for column in columns if any(_figure(row, column[1]) for row in rows)]
    if not columns:
        return None
    head = [Cell(title, "lower is better" if title in LOWER else "") for title, *_ in columns]
    body = [
        [
            Cell(row["label"], dot=color(i)),
            *(_cell(_figure(row, key), scale, form, most) for _, key, scale, form, most in columns),
        ]
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


def _cell(figure: dict[str, Any] | None, scale: float, form: str, most: int) -> Cell:
    """A figure with as many digits as its interval allows, at most those of the column."""
    if figure is None or figure["value"] is None:
        return Cell("-", hint="not applicable" if figure is None else figure["why"])
    note, places = "", most
    if figure["ci95"] and figure["ci95"][0] < figure["ci95"][1]:
        ends = [scale * end for end in figure["ci95"]]
        places = decimals((ends[1] - ends[0]) / 2, most)
        note = " to ".join(form.format(end, places=places).split(" ")[0] for end in ends)
    return Cell(form.format(scale * figure["value"], places=places), note)


def interval_plot(rows: Sequence[dict[str, Any]], prompts: int) -> IntervalPlot | None:
    """Plot speed-up and quality of every method with their intervals, as the verdicts use them.

    Quality is the change in prompts followed where prompts can be judged, else SSIM to dense.
    """
    methods = [(row, color(i)) for i, row in enumerate(rows) if i]
    speeds = [_ends(speed_estimate(row, prompts), math.exp) for row, _ in methods]
    judged = any(quality_estimate(row, prompts) for row, _ in methods)
    if judged:
        qualities = [_ends(quality_estimate(row, prompts), lambda share: 100 * share) for row, _ in methods]
    else:
        qualities = [_recorded(row["ssim"]) for row, _ in methods]
    if not any(speeds) and not any(qualities):
        return None
    times = Axis.over(
        "speed-up over dense", _values(speeds, 4.0), lambda x: f"{x:g}x", (1.0, "as fast as dense"), limits=(0.0, 1e9)
    )
    if judged:
        title, mark = "prompts followed, change in points", (0.0, "as often as dense")
        quality = Axis.over(title, [*_values(qualities, 100.0), -100 * TOLERANCE], _signed, mark, 20.0)
    else:
        quality = Axis.over("SSIM to dense", _values(qualities, 1.0), "{:g}".format, (1.0, "equal to dense"), 0.1)
    cells, said = [], []
    for (row, shade), speed, good in zip(methods, speeds, qualities, strict=True):
        texts = [_times(speed), (_points if judged else _plain)(good)]
        places = [axis.interval(*one, text) if one else None for axis, one, text in
                  zip((times, quality), (speed, good), texts, strict=True)]  # fmt: skip
        cells.append(IntervalRow(row["label"], shade, places))
        said.append(f"{row['label']}: speed-up {texts[0]}, {'change' if judged else 'SSIM'} {texts[1]}")
    return IntervalPlot("; ".join(said), (times, quality), cells)


_Ends = tuple[float, float, float]  # value, low and high


def _ends(found: Estimate | None, scale: Callable[[float], float]) -> _Ends | None:
    if found is None:
        return None
    low, high = (scale(end) if math.isfinite(end) else end for end in (found.low, found.high))
    return scale(found.value), low, high


def _recorded(figure: dict[str, Any] | None) -> _Ends | None:
    return None if not figure else (figure["value"], *(figure["ci95"] or (figure["value"], figure["value"])))


def _values(found: Sequence[_Ends | None], most: float) -> list[float]:
    """Values and ends that an axis has to hold; intervals beyond ``most`` are cut, not the values."""
    ends = [min(max(end, -most), most) for one in found if one for end in one[1:]]
    return [*ends, *(one[0] for one in found if one)]


def _signed(points: float) -> str:
    return f"{points:+g}" if points else "0"


def _times(one: _Ends | None) -> str:
    return _said(one, "{:.2f}x", "{:.2f}")


def _points(one: _Ends | None) -> str:
    return _said(one, "{:+.0f} points", "{:+.0f}")


def _plain(one: _Ends | None) -> str:
    return _said(one, "{:.3f}", "{:.3f}")


def _said(one: _Ends | None, value: str, end: str) -> str:
    if one is None:
        return "-"
    known = math.isfinite(one[1]) and math.isfinite(one[2])
    return value.format(one[0]) + (f" ({end.format(one[1])} to {end.format(one[2])})" if known else " (no interval)")
