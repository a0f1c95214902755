"""The page of a search for heads: what was found, score by round, every head's score, pictures before and after."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dit_attn.eval.report.heatmap import heatmap
from dit_attn.eval.report.map_page import filled

TEMPLATE = Path(__file__).with_name("search_page.html")
SMALLEST = 128  # pixels of a picture's height on the page; smaller ones are enlarged without smoothing


def page(found: dict[str, Any], grid: Sequence[dict[str, Any]], fps: int = 8) -> str:
    """``search.html``.

    Args:
        found: ``heads.json``.
        grid: by pair ``prompt``, ``seed`` and ``pictures``, by name uint8 (F, H, W, 3), ``None`` for none.
        fps: of clips.
    """
    about = found["search"]
    return filled(
        TEMPLATE,
        title=html.escape(f"{found['model'] or found['transformer']}: heads for {about['objective']}"),
        about=html.escape(summary(found)),
        findings="".join(f"<li>{html.escape(text)}</li>" for text in findings(found)),
        heads=heads_table(found),
        plots="".join(plot(name, checks, about) for name, checks in found["checks"].items()),
        checks="".join(checks_table(name, checks) for name, checks in found["checks"].items()),
        maps="".join(maps(found)),
        grid=pictures(grid, fps),
        cost=cost_table(about),
        command=html.escape(str(about.get("command", "HeadHunter(pipe, ...).search()"))),
        facts="".join(
            f"<dt>{html.escape(str(key))}</dt><dd>{html.escape(str(value))}</dd>" for key, value in facts(found)
        ),
    )


# -- words -------------------------------------------------------------------------------------------------------------


def summary(found: dict[str, Any]) -> str:
    """One line: what was searched and how."""
    about = found["search"]
    count = sum(found["layers"].values())
    return (
        f"{about['strategy']} search over {count} heads of {len(found['layers'])} layers, {about['rounds']} rounds of "
        f"{about['per_round']} heads, {len(about['pairs'])} pairs of prompt and noise; strength u = {about['u']:g}, "
        f"scale w = {found['scale']:g}, guidance scale {about['guidance_scale']:g}."
    )


def findings(found: dict[str, Any]) -> list[str]:
    """What the figures say, a sentence each."""
    out = []
    for name, checks in found["checks"].items():
        label = list(_sets(checks))[-1]
        gain = checks[label]["gain"]
        if gain is None:
            out.append(f"On the {_words(name)} pairs the found heads have no finite score.")
            continue
        way = "raise" if gain["value"] > 0 else "lower"
        out.append(
            f"On the {_words(name)} pairs the found heads {way} the score by {abs(gain['value']):.4g} over no "
            f"guidance{_unsure(gain)}."
        )
        rivals = [one["gain"] for key, one in checks.items() if key.startswith("random") and one["gain"]]
        if rivals:
            mean = sum(one["value"] for one in rivals) / len(rivals)
            out.append(f"As many random heads change it by {mean:+.4g} there ({_many(len(rivals), 'random set')}).")
        lead = found["search"].get("best_layer", {}).get("lead", {}).get(name)
        if lead is not None:
            layer, way = found["search"]["best_layer"]["name"], "above" if lead["value"] > 0 else "below"
            out.append(
                f"The whole {layer}, the best layer on the searched pairs, changes it by "
                f"{checks[layer]['gain']['value']:+.4g} there; the heads are {abs(lead['value']):.4g} {way} it"
                f"{_unsure(lead)}."
            )
    spread = {layer for layer, _, _ in found["heads"]}
    out.append(f"The {len(found['heads'])} heads lie in {len(spread)} of {len(found['layers'])} layers.")
    images = sum(found["search"]["images"].values())
    out.append(f"{images:,} images were made; the full greedy search takes {found['search']['images_of_greedy']:,} "
               "for its candidates.")  # fmt: skip
    return out


def facts(found: dict[str, Any]) -> list[tuple[str, Any]]:
    """What a reader needs to repeat it."""
    about = found["search"]
    plain = {
        "transformer": found["transformer"], "target": found["target"], "joint convention": found["joint"],
        "judged by": f"{about['network'] or about['objective']} ({about['unit']})",
        "steps": f"{about['steps']} for candidates, {about['full_steps']} for checks",
        "seconds": about.get("seconds", "not taken"), "processes": about.get("processes", 1),
        "commit": about.get("commit", "unknown"),
    }  # fmt: skip
    return [*plain.items(), *about.get("environment", {}).items(), *about.get("versions", {}).items()]


def _words(name: str) -> str:
    return "held-out" if name == "held_out" else "searched"


def _many(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _sets(checks: dict[str, Any]) -> dict[str, Any]:
    """The sets of the search, in their order, without what they are checked beside."""
    return {name: one for name, one in checks.items() if not name.startswith(("none", "layer", "random"))}


def _unsure(figure: dict[str, Any]) -> str:
    ends = figure["ci95"]
    return "" if ends and (ends[0] > 0 or ends[1] < 0) else ", within the noise"


# -- tables ------------------------------------------------------------------------------------------------------------


def heads_table(found: dict[str, Any]) -> str:
    """The heads that were found, with the round they joined in and their score then."""
    joined: dict[tuple[str, int], tuple[Any, float | None]] = {}
    for number, one in enumerate(found["rounds"], 1):
        scores = {(layer, head): value for layer, head, value in one["scores"]}
        joined.update({(layer, head): (number, scores.get((layer, head))) for layer, head in one["chosen"]})
    rows = ""
    for layer, head, u in found["heads"]:
        number, score = joined.get((layer, head), ("-", None))
        told = "-" if score is None else f"{score:.4g}"
        rows += f'<tr><th scope="row">{html.escape(layer)}</th><td>{head}</td><td>{u:g}</td><td>{number}</td>'
        rows += f"<td>{told}</td></tr>"
    titles = ("layer", "head", "strength u", "round", "score of the set with it")
    head = "".join(f'<th scope="col">{title}</th>' for title in titles)
    return f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody>"


def checks_table(name: str, checks: dict[str, Any]) -> str:
    """Scores of all sets, with intervals."""
    rows = ""
    for label, one in checks.items():
        rows += f'<tr><th scope="row">{html.escape(_label(label))}</th><td>{len(one["heads"])}</td>'
        rows += f"<td>{_cell(one['score'])}</td><td>{_cell(one['gain'], '+.4g')}</td></tr>"
    titles = ("set", "heads", "score", "gain over no guidance")
    head = "".join(f'<th scope="col">{title}</th>' for title in titles)
    return (
        f'<h3>On the {_words(name)} pairs</h3><div class="scroll" tabindex="0" role="region" '
        f'aria-label="scores on the {_words(name)} pairs"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def cost_table(about: dict[str, Any]) -> str:
    """Images and transformer passes by purpose."""
    rows = "".join(
        f'<tr><th scope="row">{html.escape(name)}</th><td>{count:,}</td><td>{about["passes"][name]:,}</td></tr>'
        for name, count in about["images"].items()
    )
    head = '<th scope="col">for</th><th scope="col">images</th><th scope="col">transformer passes of one sample</th>'
    return f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody>"


def _cell(figure: dict[str, Any] | None, form: str = ".4g") -> str:
    if figure is None:
        return "-"
    text = f"{figure['value']:{form}}"
    if not figure["ci95"]:
        return text
    low, high = (f"{end:{form}}" for end in figure["ci95"])
    return f"{text} <small>{low} to {high}</small>"


def _label(name: str) -> str:
    return "no guidance" if name == "none" else f"after {name}" if name.startswith("round") else name


# -- pictures ----------------------------------------------------------------------------------------------------------


def maps(found: dict[str, Any]) -> list[str]:
    """Layer by head, one map a round: the score of the set with each head; holes were selected or left out before."""
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
        out.append(heatmap(table, layers, columns, title, found["search"]["unit"], scale))
    return out


def plot(name: str, checks: dict[str, Any], about: dict[str, Any], width: int = 560, height: int = 260) -> str:
    """Score against round with intervals, no guidance first, random sets as dashes."""
    points = [(label, one["score"]) for label, one in checks.items() if label == "none" or label.startswith("round")]
    points = [(label, score) for label, score in points if score is not None]
    random = [one["score"]["value"] for label, one in checks.items() if label.startswith("random") and one["score"]]
    if not points:
        return "<p>No finite score to draw.</p>"
    ends = [x for _, score in points for x in (*(score["ci95"] or ()), score["value"])] + random
    low, high = min(ends), max(ends)
    room = 0.06 * (high - low or 1.0)
    low, high, left, bottom = low - room, high + room, 64, 42

    def at(i: float, value: float) -> tuple[float, float]:
        across = left + 24 + i * (width - left - 56) / max(len(points) - 1, 1)
        return across, height - bottom - (value - low) / (high - low) * (height - bottom - 12)

    said = ", ".join(f"{_label(label)} {score['value']:.4g}" for label, score in points)
    alt = html.escape(f"{about['objective']} by round: {said}", quote=True)
    parts = [
        f'<figure class="plot"><figcaption>Score by round, {_words(name)} pairs</figcaption>'
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{alt}">'
        f'<path d="M{left},12V{height - bottom}H{width - 8}" class="axis"/>'
    ]
    for step in range(5):
        value = low + (high - low) * step / 4
        y = at(0, value)[1]
        parts.append(f'<path d="M{left},{y:.1f}H{width - 8}" class="grid"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end" class="tick">{value:.4g}</text>')
    for value in random:
        y = at(0, value)[1]
        parts.append(f'<path d="M{left},{y:.1f}H{width - 8}" class="even"/>')
    line = "L".join(f"{x:.1f},{y:.1f}" for x, y in (at(i, score["value"]) for i, (_, score) in enumerate(points)))
    parts.append(f'<path d="M{line}" class="best"/>')
    every = max(1, len(points) // 8)
    for i, (label, score) in enumerate(points):
        x, y = at(i, score["value"])
        if score["ci95"]:
            bounds = [at(i, end)[1] for end in score["ci95"]]
            parts.append(f'<path d="M{x:.1f},{bounds[0]:.1f}V{bounds[1]:.1f}" class="best"/>')
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" class="best"/>')
        if i % every == 0:
            short = "none" if label == "none" else label.removeprefix("round ")
            place = f'x="{x:.1f}" y="{height - bottom + 16}"'
            parts.append(f'<text {place} text-anchor="middle" class="tick">{short}</text>')
    parts.append(f'<text x="{(left + width) / 2}" y="{height - 6}" text-anchor="middle">round</text></svg>')
    dashes = " Dashes: random sets of as many heads." if random else ""
    return "".join([*parts, f'<p class="soft">Bars are 95 % intervals over prompts.{dashes}</p></figure>'])


def pictures(grid: Sequence[dict[str, Any]], fps: int) -> str:
    """The pairs as rows, what made them as columns."""
    if not grid:
        return "<p>No pictures were made.</p>"
    rows = ""
    for one in grid:
        cells = ""
        for name, frames in one["pictures"].items():
            alt = html.escape(f"{_label(name)}: {one['prompt']}, seed {one['seed']}", quote=True)
            shown = "<i>not finite</i>" if frames is None else f'<img src="{_source(frames, fps)}" alt="{alt}">'
            cells += f"<figure>{shown}<figcaption>{html.escape(_label(name))}</figcaption></figure>"
        rows += f'<h3>{html.escape(one["prompt"])}, seed {one["seed"]}</h3><div class="grid">{cells}</div>'
    return rows


def _source(frames: np.ndarray, fps: int) -> str:
    """A data address: PNG, or an endless GIF of a clip."""
    from PIL import Image

    factor = max(1, -(-SMALLEST // frames.shape[1]))
    shown = [Image.fromarray(frame) for frame in frames]
    shown = [picture.resize((picture.width * factor, picture.height * factor), 0) for picture in shown]
    file, kind = io.BytesIO(), "GIF" if len(shown) > 1 else "PNG"
    extra: dict[str, Any] = {"save_all": True, "append_images": shown[1:], "duration": 1000 // fps, "loop": 0}
    shown[0].save(file, kind, **(extra if kind == "GIF" else {}))
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"
