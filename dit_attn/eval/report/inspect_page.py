"""The page of an inspection: maps of every statistic by layer, step and head, in one file that needs no network."""

from __future__ import annotations

import html
import math
from pathlib import Path
from typing import Any

import torch

from dit_attn.eval.attention_stats import BEST, MASS, PICKED, Statistic, describe, ordered
from dit_attn.eval.report.heatmap import heatmap
from dit_attn.eval.report.map_page import filled

TEMPLATE = Path(__file__).with_name("inspect_page.html")
BRANCHES = {"cond": "with the prompt", "uncond": "without the prompt"}
Tensors = dict[str, torch.Tensor]


def page(meta: dict[str, Any], tensors: Tensors) -> str:
    """``inspect.html``.

    Args:
        meta: ``inspect.json``.
        tensors: by statistic, (branches, layers, steps, heads) fp32, NaN for holes.
    """
    names = ordered(tensors)
    return filled(
        TEMPLATE,
        title=html.escape(f"{meta.get('model', 'A run')}: what its attention does"),
        about=html.escape(about(meta)),
        findings="".join(f"<li>{html.escape(text)}</li>" for text in findings(meta, tensors)),
        curve_words=html.escape(curve_words(meta)),
        curve=curve(tensors),
        key='<span><i style="background:var(--accent)"></i>best blocks of every row</span>'
        '<span><i style="background:var(--other)"></i>blocks picked by their means</span><span>- - uniform</span>',
        table=table(meta, tensors, names),
        links="".join(f'<a href="#{_anchor(name)}">{html.escape(describe(name).title)}</a>' for name in names),
        maps="".join(section(meta, name, tensors[name]) for name in names),
        command=html.escape(str(meta.get("command", "dit_attn.pipelines.inspect.inspect(...)"))),
        facts="".join(f"<dt>{html.escape(str(k))}</dt><dd>{html.escape(str(v))}</dd>" for k, v in facts(meta)),
    )


# -- words -------------------------------------------------------------------------------------------------------------


def about(meta: dict[str, Any]) -> str:
    """One line: what was looked at."""
    axes = meta["axes"]
    counts = (len(axes[name]) for name in ("layer", "step", "head"))
    what = "{} layers, {} steps, {} heads".format(*counts)
    item = f"{meta['prompt']!r}, seed {meta.get('noise_seed', '?')}: " if "prompt" in meta else ""
    methods = ", ".join(method["method"] for method in meta.get("methods", ())) or "dense attention"
    return f"{item}{what}, run with {methods}; {meta['rows']} query rows of every attention call at most."


def findings(meta: dict[str, Any], tensors: Tensors) -> list[str]:
    """What the figures say, a sentence each."""
    layers, by_layer = meta["axes"]["layer"], tensors["blocks_90"].nanmean((0, 2, 3))
    low, high = (_extreme(by_layer, largest) for largest in (False, True))
    found = [
        f"90 % of the softmax mass lies in {_mean(tensors['keys_90']):.0%} of the keys, or in "
        f"{_mean(tensors['blocks_90']):.0%} of the {meta['block']}-token key blocks: {by_layer[low]:.0%} in "
        f"{layers[low]}, {by_layer[high]:.0%} in {layers[high]}.",
        f"At density 25 % the best blocks hold {_mean(tensors['best_25']):.0%} of the mass and a selection by block "
        f"means recalls {_mean(tensors['recall_25']):.0%}.",
    ]
    if "same_frame" in tensors:
        found.append(f"{_mean(tensors['same_frame']):.0%} of what a row reads in the clip is in its own frame.")
    text = [name for name in tensors if name.startswith("mass.text")]
    found += [f"The prompt's tokens get {_mean(tensors[name]):.0%} of the mass." for name in text]
    if not text:
        found.append("The sequence of these layers has no text tokens, so there is no text mass.")
    return [*found, overhead(meta["timing"]), *_skipped(meta)]


def overhead(timing: dict[str, Any]) -> str:
    """What watching cost, in words."""
    seen = f"{timing['observed_seconds']:.1f} s"
    if timing["overhead"] is None:
        return f"The observed run took {seen}, {timing['watching_seconds']:.1f} s of it in the measurements."
    changed = "the same result bit for bit" if timing["unchanged"] else "another result: the run is not deterministic"
    return (
        f"Watching cost {timing['overhead']:.0%} ({seen} against {timing['plain_seconds']:.1f} s plain) and left "
        f"{changed}."
    )


def _skipped(meta: dict[str, Any]) -> list[str]:
    return [f"{count} of {meta['calls']} calls were not measured: {why}." for why, count in meta["skipped"].items()]


def curve_words(meta: dict[str, Any]) -> str:
    """How to read the curve."""
    return (
        f"Share of the softmax mass that is kept when only a part of the {meta['block']}-token key blocks is read, "
        "mean over all rows, heads, layers and steps. The higher line is the bound: every row takes its best blocks. "
        "The other is a selection by block means, which a kernel can make. The gap between them is what better "
        "selection could win."
    )


def uniform(meta: dict[str, Any], name: str) -> float | None:
    """What uniform attention would give, where that is one number."""
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
    """What a reader needs to repeat it."""
    sequences = (
        " + ".join(
            f"{span['stop'] - span['start']} {span['kind']}"
            + (f" ({' x '.join(map(str, span['grid']))})" if span["grid"] else "")
            for span in one["spans"]
        )
        for one in meta["sequences"]
    )
    found = {"tokens": "; ".join(sequences) or "parts unknown", "seed of the rows": meta["seed"]}
    return [*found.items(), *meta.get("environment", {}).items(), *meta.get("versions", {}).items()]


# -- table, curve, maps ------------------------------------------------------------------------------------------------


def table(meta: dict[str, Any], tensors: Tensors, names: list[str]) -> str:
    """Head and body of the table: mean by branch, and the layers where it is least and largest."""
    branches, layers = meta["axes"]["branch"], meta["axes"]["layer"]
    means = [BRANCHES.get(name, name) for name in branches] if len(branches) > 1 else ["mean"]
    heads = ["statistic", *means, "uniform", "least in", "largest in"]
    head = "".join(f'<th scope="col">{html.escape(text)}</th>' for text in heads)
    body = ""
    for name in names:
        about, by_layer = describe(name), tensors[name].nanmean((0, 2, 3))
        even = uniform(meta, name)
        cells = [f"{float(tensors[name][i].nanmean()):.3g}" for i in range(len(branches))]
        cells.append("-" if even is None else f"{even:.3g}")
        ends = (_extreme(by_layer, largest) for largest in (False, True))
        cells += [f"{layers[end]} ({float(by_layer[end]):.3g})" for end in ends]
        row = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
        title = f'{html.escape(about.title)} <span class="soft">{html.escape(about.unit)}</span>'
        body += f'<tr><th scope="row">{title}</th>{row}</tr>'
    return f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"


def section(meta: dict[str, Any], name: str, tensor: torch.Tensor) -> str:
    """One statistic: how to read it, a map of layer by step for every branch, one of layer by head."""
    about, axes = describe(name), meta["axes"]
    by_step, by_head = tensor.nanmean(3), tensor.nanmean((0, 2))
    scale = about.scale or _range(by_step, by_head)
    maps = [
        heatmap(by_step[i].tolist(), axes["layer"], axes["step"], _caption(about, branch, axes), about.unit, scale)
        for i, branch in enumerate(axes["branch"])
    ]
    heads = f"{about.title}, layer by head"
    maps.append(heatmap(by_head.tolist(), axes["layer"], axes["head"], heads, about.unit, scale))
    even = uniform(meta, name)
    more = "" if even is None else f" Uniform attention would give {even:.3g}."
    return (
        f'<h3 id="{_anchor(name)}">{html.escape(about.title)}</h3><p>{html.escape(about.reading + more)}</p>'
        f'<div class="maps">{"".join(maps)}</div>'
    )


def curve(tensors: Tensors, width: int = 560, height: int = 300) -> str:
    """Mass against density as inline SVG."""
    left, bottom = 46, 44

    def at(x: float, y: float) -> str:
        across = left + x * (width - left - 16)
        return f"{across:.1f},{height - bottom - y * (height - bottom - 12):.1f}"

    ends = {"best": (BEST, "best_"), "means": (PICKED, "recall_")}
    parts, said = [], []
    for kind, (shares, prefix) in ends.items():
        places = [(share, f"{prefix}{share:.0%}".rstrip("%")) for share in shares]
        points = [(share, _mean(tensors[name])) for share, name in places if name in tensors]
        if kind == "best" and "blocks_90" in tensors:
            points.append((_mean(tensors["blocks_90"]), MASS))
        points = sorted((x, y) for x, y in points if not math.isnan(y))
        said += [f"{'best blocks' if kind == 'best' else 'block means'} at {x:.0%}: {y:.0%}" for x, y in points]
        line = "L".join(at(x, y) for x, y in [(0.0, 0.0), *points, (1.0, 1.0)])
        parts.append(f'<path d="M{line}" class="{kind}"/>')
        for x, y in points:
            px, py = at(x, y).split(",")
            parts.append(f'<circle cx="{px}" cy="{py}" r="4" class="{kind}"><title>{x:.0%}: {y:.0%}</title></circle>')
    frame = [
        f'<path d="M{at(0, 1)}L{at(0, 0)}L{at(1, 0)}" class="axis"/>',
        f'<path d="M{at(0, 0)}L{at(1, 1)}" class="even"/>',
    ]
    for i in range(5):
        px, py = at(i / 4, 0).split(",")[0], at(0, i / 4).split(",")[1]
        frame.append(f'<text x="{px}" y="{height - bottom + 16}" text-anchor="middle" class="tick">{i / 4:.0%}</text>')
        frame.append(f'<text x="{left - 6}" y="{py}" dy="4" text-anchor="end" class="tick">{i / 4:.0%}</text>')
        frame.append(f'<path d="M{at(0, i / 4)}L{at(1, i / 4)}" class="grid"/>')
    middle = (left + width) / 2
    frame.append(f'<text x="{middle}" y="{height - 8}" text-anchor="middle">key blocks read</text>')
    label = f"softmax mass kept against density of key blocks; {', '.join(said)}"
    opening = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(label)}">'
    return "".join([opening, *frame, *parts, "</svg>"])


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


def _anchor(name: str) -> str:
    return "s-" + name.replace(".", "-")
