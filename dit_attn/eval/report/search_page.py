"""The page of a search for heads: whether to use them, images before and after, score by round, every head's score."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from dit_attn.eval.report.digits import write_figure, write_value
from dit_attn.eval.report.estimates import mean_estimate
from dit_attn.eval.report.heatmap import HeatMap, heat_map
from dit_attn.eval.report.media_source import data_address
from dit_attn.eval.report.plot import Plot
from dit_attn.eval.report.render import render
from dit_attn.eval.report.search_verdict import found_sets, search_verdict
from dit_attn.eval.report.table import Cell, Row, Table

SMALLEST = 128  # pixels of an image's height on the page; smaller ones are enlarged without smoothing


def page(found: dict[str, Any], grid: Sequence[dict[str, Any]], fps: int = 8) -> str:
    """Render ``search.html``.

    Args:
        found: ``heads.json``.
        grid: by pair ``prompt``, ``seed`` and ``images``, by name uint8 (F, H, W, 3), ``None`` for none.
        fps: of videos.
    """
    about = found["search"]
    return render(
        "search_page.html",
        title=f"{found['model'] or found['transformer']}: heads for {about['objective']}",
        about=summary(found),
        verdict=search_verdict(found),
        findings=findings(found),
        heads=heads_table(found),
        checks=[check_section(name, checks, about) for name, checks in found["checks"].items()],
        maps=maps(found),
        pairs=[shown_pair(one, fps) for one in grid],
        cost=cost_table(about),
        command=about.get("command", "HeadHunter(pipe, ...).search()"),
        facts=facts(found),
    )


# -- words -------------------------------------------------------------------------------------------------------------


def summary(found: dict[str, Any]) -> str:
    """Say in one line what was searched and how."""
    about = found["search"]
    count = sum(found["layers"].values())
    rounds = f"{_many(about['rounds'], 'round')} of {_many(about['per_round'], 'head')}"
    return (
        f"{about['strategy']} search over {count} heads of {len(found['layers'])} layers, {rounds}, "
        f"{_many(len(about['pairs']), 'pair')} of prompt and noise; strength u = {about['u']:g}, "
        f"scale w = {found['scale']:g}, guidance scale {about['guidance_scale']:g}."
    )


def findings(found: dict[str, Any]) -> list[str]:
    """Say what the figures mean, a sentence each."""
    out = []
    for name, checks in found["checks"].items():
        label = list(found_sets(checks))[-1]
        gain, others = checks[label]["gain"], [one for key, one in checks.items() if key.startswith("random")]
        if gain is None:
            out.append(f"On the {_words(name)} pairs the found heads have no finite score.")
            continue
        way = "raise" if gain["value"] > 0 else "lower"
        out.append(
            f"On the {_words(name)} pairs the found heads {way} the score by "
            f"{write_value(abs(gain['value']), gain['ci95'])} over no guidance{_unsure(gain)}."
        )
        known = [one["gain"]["value"] for one in others if one["gain"]]
        if known:
            mean = write_value(sum(known) / len(known), gain["ci95"], "+")
            out.append(f"As many random heads change it by {mean} there ({_many(len(known), 'random set')}).")
        lead = found["search"].get("best_layer", {}).get("lead", {}).get(name)
        if lead is not None:
            layer, way = found["search"]["best_layer"]["name"], "above" if lead["value"] > 0 else "below"
            out.append(
                f"All heads of {layer}, the best layer on the searched pairs, change it by "
                f"{write_figure(checks[layer]['gain'], '+')[0]} there; the heads are "
                f"{write_value(abs(lead['value']), lead['ci95'])} {way} it{_unsure(lead)}."
            )
    spread = {layer for layer, _, _ in found["heads"]}
    verb = "lies" if len(found["heads"]) == 1 else "lie"
    out.append(f"The {_many(len(found['heads']), 'head')} {verb} in {len(spread)} of {len(found['layers'])} layers.")
    images = sum(found["search"]["images"].values())
    out.append(f"{images:,} images were made; the full greedy search takes {found['search']['images_of_greedy']:,} "
               "for its candidates.")  # fmt: skip
    return out


def facts(found: dict[str, Any]) -> list[tuple[str, Any]]:
    """Collect what a reader needs to repeat it."""
    about = found["search"]
    plain = {
        "transformer": found["transformer"], "target": found["target"], "joint convention": found["joint"],
        "judged by": f"{about['network'] or about['objective']} ({about['unit']})",
        "steps": f"{about['steps']} for candidates, {about['full_steps']} for checks",
        "seconds": about.get("seconds", "not taken"), "processes": about.get("processes", 1),
        "commit": about.get("commit", "unknown"),
    }  # fmt: skip
    return list({**plain, **about.get("environment", {}), **about.get("versions", {})}.items())


def _words(name: str) -> str:
    return "held-out" if name == "held_out" else "searched"


def _many(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _unsure(figure: dict[str, Any]) -> str:
    known = mean_estimate(figure, figure["n"])
    return "" if known.low > 0 or known.high < 0 else ", within the noise"


# -- tables ------------------------------------------------------------------------------------------------------------


def heads_table(found: dict[str, Any]) -> Table:
    """List the heads that were found, with the round they joined in and their score then."""
    joined: dict[tuple[str, int], tuple[Any, float | None]] = {}
    for number, one in enumerate(found["rounds"], 1):
        scores = {(layer, head): value for layer, head, value in one["scores"]}
        joined.update({(layer, head): (number, scores.get((layer, head))) for layer, head in one["chosen"]})
    none = found["checks"].get("searched", {}).get("none", {}).get("score")  # how well a score is known
    width = none["ci95"] if none else None
    rows = []
    for layer, index, u in found["heads"]:
        number, score = joined.get((layer, index), ("-", None))
        rows.append([layer, index, f"{u:g}", number, "-" if score is None else write_value(score, width)])
    head = ["layer", "head", "strength u", "round", "score of the set with it"]
    return Table("the heads that were found", head, rows)


def check_section(name: str, checks: dict[str, Any], about: dict[str, Any]) -> dict[str, Any]:
    """Collect what the template draws of the sets on one part of the pairs."""
    return {
        "pairs": f"{_words(name)} pairs",
        "plot": score_plot(name, checks, about),
        "randoms": bool(_randoms(checks)),
        "table": checks_table(name, checks),
    }


def checks_table(name: str, checks: dict[str, Any]) -> Table:
    """List the scores of all sets, with intervals."""
    rows: list[Row] = [
        [_label(label), len(one["heads"]), Cell(*write_figure(one["score"])), Cell(*write_figure(one["gain"], "+"))]
        for label, one in checks.items()
    ]
    return Table(f"scores on the {_words(name)} pairs", ["set", "heads", "score", "gain over no guidance"], rows)


def cost_table(about: dict[str, Any]) -> Table:
    """Count images and transformer passes by purpose."""
    rows = [[name, f"{count:,}", f"{about['passes'][name]:,}"] for name, count in about["images"].items()]
    return Table("images and passes", ["for", "images", "transformer passes of one sample"], rows)


def _label(name: str) -> str:
    return "no guidance" if name == "none" else f"after {name}" if name.startswith("round") else name


# -- plots and images --------------------------------------------------------------------------------------------------


def maps(found: dict[str, Any]) -> list[HeatMap]:
    """Draw layer by head, one map a round: the score of the set with each head; holes were selected before."""
    layers = list(found["layers"])
    width = max(found["layers"].values())
    tables = []
    for number, one in enumerate(found["rounds"], 1):
        tables.append((f"Round {number}: score of the set with each head", one["scores"]))
        for name, values in one["screened"].items():
            title = "slope, d score / d u" if name == "slope" else f"score on {name}"
            tables.append((f"Round {number}, screening: {title}", values))
    out = []
    for title, values in tables:
        known = {(layer, head): value for layer, head, value in values}
        finite = [value for value in known.values() if value is not None]
        scale = (min(finite), max(finite)) if finite and min(finite) < max(finite) else None
        table = [[known.get((layer, head)) for head in range(width)] for layer in layers]
        columns = [f"head {head}" for head in range(width)]
        out.append(heat_map(table, layers, columns, title, found["search"]["unit"], scale))
    return out


def score_plot(name: str, checks: dict[str, Any], about: dict[str, Any]) -> Plot | None:
    """Plot score against round with intervals, no guidance first, random sets as dashes."""
    points = [(label, one["score"]) for label, one in checks.items() if label == "none" or label.startswith("round")]
    points = [(label, score) for label, score in points if score is not None]
    random = _randoms(checks)
    if not points:
        return None
    ends = [x for _, score in points for x in (*(score["ci95"] or ()), score["value"])] + random
    low, high = min(ends), max(ends)
    room = 0.06 * (high - low or 1.0)
    said = ", ".join(f"{_label(label)} {write_figure(score)[0]}" for label, score in points)
    plot = Plot(
        f"{about['objective']} by round, {_words(name)} pairs: {said}",
        (0.0, max(len(points) - 1.0, 1.0)),
        (low - room, high + room),
        "round",
        width=560,
        height=260,
        left=64,
        inset=24,
    )
    plot.ticks(None, "{:.4g}".format)
    for value in random:
        plot.level(value, "even")
    plot.line([(i, score["value"]) for i, (_, score) in enumerate(points)], "best")
    every = max(1, len(points) // 8)
    for i, (label, score) in enumerate(points):
        if score["ci95"]:
            plot.line([(i, end) for end in score["ci95"]], "best")
        plot.point(i, score["value"], "best", title=f"{_label(label)}: {write_figure(score)[0]}")
        if i % every == 0:
            plot.x_ticks.append((plot.at(i, low)[0], "none" if label == "none" else label.removeprefix("round ")))
    return plot


def _randoms(checks: dict[str, Any]) -> list[float]:
    """Scores of the random sets."""
    return [one["score"]["value"] for label, one in checks.items() if label.startswith("random") and one["score"]]


def shown_pair(one: dict[str, Any], fps: int) -> dict[str, Any]:
    """Collect a pair of prompt and noise: caption and address of what was made with each set."""
    images = [
        {"label": _label(name), "src": None if frames is None else _source(frames, fps)}
        for name, frames in one["images"].items()
    ]
    return {"prompt": one["prompt"], "seed": one["seed"], "images": images}


def _source(frames: np.ndarray, fps: int) -> str:
    """Encode as a data address: PNG, or an endless GIF of a video."""
    from PIL import Image

    factor = max(1, -(-SMALLEST // frames.shape[1]))
    shown = [Image.fromarray(frame) for frame in frames]
    shown = [image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST) for image in shown]
    file, kind = io.BytesIO(), "GIF" if len(shown) > 1 else "PNG"
    extra: dict[str, Any] = {"save_all": True, "append_images": shown[1:], "duration": 1000 // fps, "loop": 0}
    shown[0].save(file, kind, **(extra if kind == "GIF" else {}))
    return data_address(file.getvalue(), f"image/{kind.lower()}")
