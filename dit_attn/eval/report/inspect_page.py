"""The page of an inspection: which density to set, the item, and heat maps of every attention statistic."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from dit_attn.eval.attention_stats import BEST, MASS, SELECTED, Statistic, describe, ordered
from dit_attn.eval.report.density_advice import DensityAdvice, density_advice
from dit_attn.eval.report.heatmap import HeatMap, heat_map
from dit_attn.eval.report.media_source import file_address, is_video
from dit_attn.eval.report.plot import Plot
from dit_attn.eval.report.render import render
from dit_attn.eval.report.table import Cell, Row, Table

BRANCHES = {"cond": "with the prompt", "uncond": "without the prompt"}
Tensors = dict[str, torch.Tensor]


def page(meta: dict[str, Any], tensors: Tensors, folder: Path | None = None) -> str:
    """Render ``inspect.html``.

    Args:
        meta: ``inspect.json``.
        tensors: by statistic, (branches, layers, steps, heads) fp32, NaN for holes.
        folder: where the item is that ``meta`` names; ``None`` shows none.
    """
    names, advice = ordered(tensors), density_advice(meta, tensors)
    return render(
        "inspect_page.html",
        title=f"{meta.get('model', 'A run')}: what its attention does",
        about=about(meta),
        advice=advice,
        layers=layer_bars(advice),
        item=shown_item(meta, folder),
        findings=findings(meta, tensors),
        curve_words=curve_words(meta),
        curve=curve(tensors),
        table=table(meta, tensors, names),
        sections=[section(meta, name, tensors[name]) for name in names],
        command=meta.get("command", "dit_attn.pipelines.inspect.inspect(...)"),
        facts=facts(meta),
    )


# -- words -------------------------------------------------------------------------------------------------------------


def about(meta: dict[str, Any]) -> str:
    """Say in one line what was measured."""
    axes = meta["axes"]
    counts = (len(axes[name]) for name in ("layer", "step", "head"))
    what = "{} layers, {} steps, {} heads".format(*counts)
    item = f"{meta['prompt']!r}, seed {meta.get('noise_seed', '?')}: " if "prompt" in meta else ""
    methods = ", ".join(method["method"] for method in meta.get("methods", ())) or "dense attention"
    return f"{item}{what}, run with {methods}; at most {meta['rows']} query rows of every attention call."


def shown_item(meta: dict[str, Any], folder: Path | None) -> dict[str, Any] | None:
    """Return address, kind and words of the item, ``None`` where its file is not there."""
    path = folder / Path(meta["file"]).name if folder is not None and meta.get("file") else None
    if path is None or not path.is_file():
        return None
    words = f"{meta.get('prompt', 'the item')}, seed {meta.get('noise_seed', '?')}"
    return {"src": file_address(path), "video": is_video(path), "words": words}


def layer_bars(advice: DensityAdvice | None) -> list[tuple[str, str, str]]:
    """Return (layer, density as text, width in percent) of every layer, in their order."""
    found = advice.layers.items() if advice else ()
    return [
        (name, "-" if math.isnan(x) else f"{x:.2f}", "0" if math.isnan(x) else f"{100 * x:.0f}") for name, x in found
    ]


def findings(meta: dict[str, Any], tensors: Tensors) -> list[str]:
    """Say what the figures mean, a sentence each."""
    layers, by_layer = meta["axes"]["layer"], tensors["blocks_90"].nanmean((0, 2, 3))
    low, high = (_extreme(by_layer, largest) for largest in (False, True))
    least, most = _percent(float(by_layer[low])), _percent(float(by_layer[high]))
    found = [
        f"90 % of the softmax mass lies in {_percent(_mean(tensors['keys_90']))} of the keys, or in "
        f"{_percent(_mean(tensors['blocks_90']))} of the {meta['block']}-token key blocks: {least} in {layers[low]}, "
        f"{most} in {layers[high]}.",
        f"At density 25 % the best blocks hold {_percent(_mean(tensors['best_25']))} of the mass and a selection by "
        f"block means recalls {_percent(_mean(tensors['recall_25']))}.",
    ]
    if "same_frame" in tensors:
        found.append(
            f"{_percent(_mean(tensors['same_frame']))} of what a row attends to in the video is in its own frame."
        )
    text = [name for name in tensors if name.startswith("mass.text")]
    found += [f"The prompt's tokens get {_percent(_mean(tensors[name]))} of the mass." for name in text]
    if not text:
        found.append("The sequence of these layers has no text tokens, so there is no text mass.")
    return [*found, overhead(meta["timing"]), *_skipped(meta)]


def overhead(timing: dict[str, Any]) -> str:
    """Say what measuring cost."""
    measured = f"{timing['observed_seconds']:.1f} s"
    if timing["overhead"] is None:
        return f"The measured run took {measured}, {timing['watching_seconds']:.1f} s of it in the measurements."
    changed = "the same result bit for bit" if timing["unchanged"] else "another result: the run is not deterministic"
    return (
        f"Measuring cost {_percent(timing['overhead'])} ({measured} against {timing['plain_seconds']:.1f} s plain) and "
        f"left {changed}."
    )


def _skipped(meta: dict[str, Any]) -> list[str]:
    return [f"{count} of {meta['calls']} calls were not measured: {why}." for why, count in meta["skipped"].items()]


def curve_words(meta: dict[str, Any]) -> str:
    """Say how to read the curve."""
    return (
        f"Softmax mass that a fraction of the {meta['block']}-token key blocks covers, mean over all rows, heads, "
        "layers and steps. The higher line is the bound: every row takes its best blocks. The other is a selection by "
        "block means, which a kernel can make. The gap between them is what a better selection could gain."
    )


def uniform(meta: dict[str, Any], name: str) -> float | None:
    """Compute what uniform attention would give, where that is one number."""
    if not meta["sequences"]:
        return None
    one = meta["sequences"][0]
    if name == "entropy":
        return math.log(one["seq_len"])
    if name in (one["uniform_distance"] or ()):
        return one["uniform_distance"][name]
    if name == "same_frame" and one["grid"]:
        return 1 / one["grid"][0]
    spans = {f"mass.{span['kind']}": span for span in reversed(one["spans"])}
    return (spans[name]["stop"] - spans[name]["start"]) / one["seq_len"] if name in spans else None


def facts(meta: dict[str, Any]) -> list[tuple[str, Any]]:
    """Collect what a reader needs to repeat it."""
    sequences = (
        " + ".join(
            f"{span['stop'] - span['start']} {span['kind']}"
            + (f" ({' x '.join(map(str, span['grid']))})" if span["grid"] else "")
            for span in one["spans"]
        )
        for one in meta["sequences"]
    )
    found = {"tokens": "; ".join(sequences) or "parts unknown", "seed of the rows": meta["seed"]}
    return list({**found, **meta.get("environment", {}), **meta.get("versions", {})}.items())


# -- table, curve, maps ------------------------------------------------------------------------------------------------


def table(meta: dict[str, Any], tensors: Tensors, names: list[str]) -> Table:
    """Build the table: mean by branch, and the layers where it is least and largest."""
    branches, layers = meta["axes"]["branch"], meta["axes"]["layer"]
    means = [BRANCHES.get(name, name) for name in branches] if len(branches) > 1 else ["mean"]
    rows: list[Row] = []
    for name in names:
        about, by_layer = describe(name), tensors[name].nanmean((0, 2, 3))
        even = uniform(meta, name)
        cells = [f"{float(tensors[name][i].nanmean()):.3g}" for i in range(len(branches))]
        cells.append("-" if even is None else f"{even:.3g}")
        ends = (_extreme(by_layer, largest) for largest in (False, True))
        cells += [f"{layers[end]} ({float(by_layer[end]):.3g})" for end in ends]
        rows.append([Cell(about.title, about.unit), *cells])
    return Table("table of all statistics", ["statistic", *means, "uniform", "least in", "largest in"], rows)


def section(meta: dict[str, Any], name: str, tensor: torch.Tensor) -> dict[str, Any]:
    """Collect one statistic: how to read it, a map of layer by step for every branch, one of layer by head."""
    about, axes = describe(name), meta["axes"]
    by_step, by_head = tensor.nanmean(3), tensor.nanmean((0, 2))
    scale = about.scale or _range(by_step, by_head)
    maps: list[HeatMap] = [
        heat_map(by_step[i].tolist(), axes["layer"], axes["step"], _caption(about, branch, axes), about.unit, scale)
        for i, branch in enumerate(axes["branch"])
    ]
    heads = f"{about.title}, layer by head"
    maps.append(heat_map(by_head.tolist(), axes["layer"], axes["head"], heads, about.unit, scale))
    even = uniform(meta, name)
    more = "" if even is None else f" Uniform attention would give {even:.3g}."
    mean = f"{_mean(tensor):.3g} {about.unit}"
    return {"title": about.title, "mean": mean, "reading": about.reading + more, "maps": maps}


def curve(tensors: Tensors) -> Plot:
    """Plot mass against density: the best blocks of every row, and a selection by block means."""
    found = {}
    for kind, (shares, prefix) in {"best": (BEST, "best_"), "means": (SELECTED, "recall_")}.items():
        places = [(share, f"{prefix}{share:.0%}".rstrip("%")) for share in shares]
        points = [(share, _mean(tensors[name])) for share, name in places if name in tensors]
        if kind == "best" and "blocks_90" in tensors:
            points.append((_mean(tensors["blocks_90"]), MASS))
        found[kind] = sorted((x, y) for x, y in points if not math.isnan(y))
    titles = {"best": "best blocks", "means": "block means"}
    said = ", ".join(
        f"{titles[kind]} at {_percent(x)}: {_percent(y)}" for kind, points in found.items() for x, y in points
    )
    ends = (0.0, 1.0)
    label = f"softmax mass covered against density of key blocks; {said}"
    plot = Plot(label, ends, ends, "density of key blocks", "softmax mass covered", left=68)
    plot.ticks(_percent, _percent, 6)
    plot.line([(0.0, 0.0), (1.0, 1.0)], "even")
    for kind, points in found.items():
        plot.line([(0.0, 0.0), *points, (1.0, 1.0)], kind)
        for x, y in points:
            plot.point(x, y, kind, title=f"{titles[kind]}, {_percent(x)}: {_percent(y)}")
    return plot


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _caption(about: Statistic, branch: str, axes: dict[str, Any]) -> str:
    which = f", {BRANCHES.get(branch, branch)}" if len(axes["branch"]) > 1 else ""
    return f"{about.title}, layer by step{which}"


def _range(*tables: torch.Tensor) -> tuple[float, float]:
    """Least and largest known value."""
    known = torch.cat([table.flatten() for table in tables])
    known = known[known.isfinite()]
    return (float(known.min()), float(known.max())) if len(known) else (0.0, 1.0)


def _extreme(values: torch.Tensor, largest: bool) -> int:
    filled = values.nan_to_num(-math.inf if largest else math.inf)
    return int(filled.argmax() if largest else filled.argmin())


def _mean(tensor: torch.Tensor) -> float:
    return float(tensor.nanmean())
