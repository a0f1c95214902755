"""Decide from the intervals of a comparison what each method is worth; the page and the terminal print the same words.

A method for speed is worth it when it is faster (the interval of its speed-up lies above 1) and keeps quality (the
interval of the change in prompts followed lies above -10 points). It loses quality when that interval lies below 0, and
it has no gain when the interval of its speed-up ends below 1.05. Everything else is undecided, and the number of
prompts that would decide it follows from the spread of those that there are. Where nothing can judge the prompts,
closeness to dense (SSIM) takes the place of quality, and the words say so. A method for guidance costs time: it is
worth it when more prompts are followed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dit_attn.eval.report.estimates import Estimate, change_estimate, ratio_estimate

TOLERANCE = 0.1  # share of the prompts by which quality may differ and still count as kept
NO_GAIN = 1.05  # a speed-up that is surely below is none
LITTLE = 0.25  # share of a dense step below which attention is named as the reason that nothing is gained
CLOSE = 0.9  # SSIM to dense from which images count as close
RANKS = {"good": 0, "look": 1, "few": 2, "none": 3, "bad": 4}

RULE = (
    "A method keeps quality when the 95 % interval of the change in prompts followed lies above "
    f"-{100 * TOLERANCE:.0f} points, and loses it when the interval lies below 0. It is faster when the interval of "
    f"the speed-up lies above 1, and no gain when the interval ends below {NO_GAIN:g}. Intervals of few prompts are "
    "widened (Student's t; one prompt won and one lost are added to the change). Where nothing can judge the prompts, "
    f"an SSIM from {CLOSE:g} counts as close to dense, which is no proof of quality. Everything else is undecided; how "
    "many prompts would decide it follows from their spread."
)


@dataclass(frozen=True)
class Verdict:
    """What a method is worth.

    Attributes:
        label: the variant.
        kind: ``good``, ``look`` (faster, to be judged by eye), ``few`` (undecided), ``none`` (no gain) or ``bad``.
        chip: a few words.
        sentence: the figures it follows from.
        claim: what the headline says of it, after its label.
        prompts: prompts that would decide; 0 where it is decided.
        quality: change in prompts followed, or SSIM to dense.
        speedup: over dense.
    """

    label: str
    kind: str
    chip: str
    sentence: str
    claim: str = ""
    prompts: int = 0
    quality: float = -1.0
    speedup: float = 0.0


@dataclass(frozen=True)
class _Part:
    """One side of a verdict: its state, words, and the prompts that would decide it."""

    state: str
    text: str = ""
    prompts: int = 0
    value: float = 0.0


def verdicts(rows: Sequence[dict[str, Any]], prompts: int) -> list[Verdict]:
    """Return the verdicts of all methods of a comparison, best first.

    Args:
        rows: ``headline`` of ``results.json``, dense first.
        prompts: number of different prompts.
    """
    found = [verdict(row, rows[0], prompts) for row in rows[1:]]
    return sorted(found, key=_rank)


def _rank(one: Verdict) -> tuple[float, ...]:
    order = (-one.speedup, -one.quality) if one.kind == "good" else (-one.quality, -one.speedup)
    return (RANKS[one.kind], *order)


def verdict(row: dict[str, Any], dense: dict[str, Any], prompts: int) -> Verdict:
    """Decide what one method is worth.

    Args:
        row: its row of ``headline`` in ``results.json``.
        dense: the row of dense.
        prompts: number of different prompts.
    """
    if not row["items"]:
        return Verdict(row["label"], "bad", "failed", "No item was made; results.json says why.")
    guided = bool(row.get("parallel") or (row.get("call") and not row["methods"]))
    speed, quality = _speed(row, prompts), _quality(row, dense, prompts, guided)
    kind, chip, claim = (_guidance if guided else _sparse)(speed, quality)
    if guided and row["speedup"]:
        speed = _Part("cost", f"takes {1 / speed.value:.2g} times as long as dense", value=speed.value)
    parts = [speed.text, quality.text]
    if row["attention_flops"] and not guided:
        parts.append(f"{100 * row['attention_flops']['value']:.0f} % of the attention computed")
    text = "; ".join(part for part in parts if part)
    needed = max(speed.prompts, quality.prompts) if kind == "few" else 0
    if needed:
        chip = f"too few prompts: {needed:,} would do"
    return Verdict(
        row["label"], kind, chip, f"{text[:1].upper()}{text[1:]}.", claim, needed, quality.value, speed.value
    )


def headline(found: Sequence[Verdict], prompts: int, attention_share: float | None = None) -> str:
    """Say in one or two sentences what a comparison shows.

    Args:
        found: of :func:`verdicts`, best first.
        prompts: number of different prompts.
        attention_share: fraction of a dense step that attention takes, where it is known.
    """
    if not found:
        return "Nothing was compared with dense."
    best, kinds = found[0], {one.kind for one in found}
    if best.kind in ("good", "look"):
        return f"{best.label} {best.claim}."
    if "few" in kinds:
        needed = [one.prompts for one in found if one.prompts]
        first, last = needed[0], max(needed)
        more = f" for the best so far, {last:,} for every method" if last > first else ""
        return f"Too few prompts to decide ({prompts}): {first:,} would do{more}."
    if kinds == {"bad"}:
        return "No method keeps quality." if any(one.chip != "failed" for one in found) else "Every item failed."
    if all(one.chip == "no better than dense" for one in found):
        return "No method follows more prompts than dense."
    hint = ""
    if attention_share is not None and attention_share < LITTLE:
        share = f"{100 * attention_share:.0f} % of the operations of a dense step"
        hint = f" Attention is {share} at this size: too little to gain from."
    words = "is faster than dense here" if kinds == {"none"} else "is faster than dense and keeps quality"
    return f"No method {words}.{hint}"


def speed_estimate(row: dict[str, Any], prompts: int) -> Estimate | None:
    """Return the logarithm of the speed-up of a row with its interval, ``None`` without times."""
    figure = row["speedup"]
    return None if not figure else ratio_estimate(figure, min(prompts, figure["n"]))


def quality_estimate(row: dict[str, Any], prompts: int) -> Estimate | None:
    """Return the change in prompts followed of a row with its interval, ``None`` where they cannot be judged."""
    change = (row["verifier"] or {}).get("change")
    return None if not change else change_estimate(change, min(prompts, change["n"]))


# -- the two sides -----------------------------------------------------------------------------------------------------


def _speed(row: dict[str, Any], prompts: int) -> _Part:
    found = speed_estimate(row, prompts)
    if found is None:
        return _Part("none", "no time was taken")
    value = math.exp(found.value)
    ends = [math.exp(found.low), math.exp(found.high)] if math.isfinite(found.low) else None
    ratio = f"{value:.2f}"
    spread = f"{ends[0]:.2f} to {ends[1]:.2f}" if ends and ends[0] < ends[1] else ""
    figures = f"{ratio}x, {spread or 'no interval'}"
    if ends and ends[0] > 1.0:
        return _Part("faster", f"{ratio}x as fast as dense" + (f" ({spread})" if spread else ""), value=value)
    if ends and ends[1] < NO_GAIN:
        words = "slower than dense" if ends[1] < 1.0 else "no measurable speed-up"
        return _Part("none", f"{words} ({figures})", value=value)
    gap = max(found.value, math.log(NO_GAIN) - found.value)
    return _Part("few", f"speed undecided ({figures})", found.prompts_for(gap), value)


def _quality(row: dict[str, Any], dense: dict[str, Any], prompts: int, guided: bool) -> _Part:
    """States: ``same``, ``better`` (of guidance), ``keeps``, ``worse``, ``few``; unjudged: ``close``, ``differs``."""
    found = quality_estimate(row, prompts)
    if row["equal"] == row["items"]:
        return _Part("same", "every pixel is that of dense", value=0.0 if found else 1.0)
    if found is None:
        if not row["ssim"]:
            return _Part("differs", "not compared with dense")
        similar = row["ssim"]["value"]
        text = f"SSIM {similar:.2f} to dense" + (f", PSNR {row['psnr']['value']:.0f} dB" if row["psnr"] else "")
        return _Part("close" if similar >= CLOSE else "differs", text, value=similar)
    text, value = _followed(row, dense), row["verifier"]["change"]["value"]
    if guided and found.low > 0.0:
        return _Part("better", text, value=value)
    if found.low >= -TOLERANCE and not (guided and found.high > TOLERANCE):
        return _Part("keeps", text, value=value)
    if found.high < 0.0:
        return _Part("worse", text, value=value)
    # the value lies between two thresholds: the farther one is reached with fewer prompts
    gaps = (abs(found.value), TOLERANCE - abs(found.value)) if guided else (found.value + TOLERANCE, -found.value)
    return _Part("few", text, found.prompts_for(max(gaps)), value)


def _followed(row: dict[str, Any], dense: dict[str, Any]) -> str:
    counts = []
    for one in (row, dense):
        figure = (one["verifier"] or {}).get("whole")
        counts.append(f"{figure['value'] * figure['n']:.0f} of {figure['n']}" if figure else "unknown")
    return f"prompt followed {counts[0]} times, dense {counts[1]}"


def _sparse(speed: _Part, quality: _Part) -> tuple[str, str, str]:
    """(kind, chip, claim) of a method for speed."""
    times = f"{speed.value:.1f}x" if speed.value >= NO_GAIN else f"{speed.value:.2f}x"
    if speed.state == "none":
        bad = quality.state == "worse"
        return ("bad", "no gain, loses quality", "") if bad else ("none", "no gain", "")
    if quality.state == "worse":
        return "bad", "faster, loses quality" if speed.state == "faster" else "loses quality", ""
    if "few" in (speed.state, quality.state):
        return "few", "", ""
    if quality.state == "close":
        return "good", f"close to dense, {times}", f"stays close to dense ({quality.text}) and is {times} as fast"
    if quality.state == "differs":
        return "look", "faster, differs from dense", f"is {times} as fast but differs from dense: look at the items"
    return "good", f"keeps quality, {times}", f"keeps quality and is {times} as fast as dense"


def _guidance(speed: _Part, quality: _Part) -> tuple[str, str, str]:
    """(kind, chip, claim) of a method for guidance."""
    time = f"{1 / speed.value:.2g}x the time" if speed.value else "time unknown"
    if quality.state == "better":
        return "good", f"better than dense, {time}", f"follows more prompts than dense for {time}"
    if quality.state in ("keeps", "same"):
        return "none", "no better than dense", ""
    if quality.state == "worse":
        return "bad", "worse than dense", ""
    if quality.state in ("close", "differs"):
        return "look", f"not judged, {time}", f"changes the items ({quality.text}) for {time}: look at them"
    return "few", "", ""
