"""Decide from the intervals of a search for heads whether its heads are worth using, in words for page and terminal."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean
from typing import Any

from dit_attn.eval.report.digits import write_interval, write_value
from dit_attn.eval.report.estimates import mean_estimate

_COMPARED = ("none", "layer", "random")  # sets that were not found by the search


@dataclass(frozen=True)
class SearchVerdict:
    """What the heads that were found are worth.

    Attributes:
        kind: ``good``, ``few`` (undecided), ``none`` (no gain) or ``bad``.
        chip: a few words.
        sentence: the figures it follows from.
        advice: what to do.
        pairs: held-out pairs that would decide; 0 where that is not the answer.
    """

    kind: str
    chip: str
    sentence: str
    advice: str = ""
    pairs: int = 0

    @property
    def use(self) -> bool:
        """Whether the heads are better than no guidance beyond doubt."""
        return self.kind == "good"


def search_verdict(found: dict[str, Any]) -> SearchVerdict:
    """Decide by the held-out pairs: the interval of the gain over no guidance must lie above 0.

    Args:
        found: ``heads.json``.
    """
    searched = len(found["search"]["pairs"])
    checks = found["checks"].get("held_out")
    if checks is None:
        return SearchVerdict(
            "few",
            "not checked",
            f"The heads are the best of many on {_many(searched, 'pair')}, which flatters them; no pair was held out.",
            f"Do not use them yet: search again with --held-out {searched}.",
        )
    gain = list(found_sets(checks).values())[-1]["gain"]
    pairs = len(found["search"]["held_out"])
    if gain is None:
        return SearchVerdict("bad", "no finite score", "The heads gave no finite score on the held-out pairs.")
    known = mean_estimate(gain, min(pairs, gain["n"]))
    ends = [known.low, known.high]
    text = write_value(gain["value"], gain["ci95"], "+")
    if spread := write_interval(ends, "+"):
        text += f", 95 % {spread}"
    where, than = f"On {_many(pairs, 'held-out pair')} the heads", f"no guidance ({text})"
    rest = _others(found, checks, gain)
    if known.low > 0.0:
        return SearchVerdict(
            "good", f"better by {write_value(gain['value'], gain['ci95'])}", f"{where} beat {than}{rest}."
        )
    if known.high < 0.0:
        return SearchVerdict(
            "bad", "worse than no guidance", f"{where} are worse than {than}{rest}.", "Do not use them."
        )
    if gain["value"] <= 0.0:
        return SearchVerdict(
            "none",
            "no gain",
            f"{where} do not beat {than}{rest}.",
            f"Do not use them yet: search on more pairs (--pairs {2 * searched} --held-out {max(pairs, 2 * searched)}"
            f"{_minutes(found, 2 * searched)}).",
        )
    needed = known.prompts_for(gain["value"])
    return SearchVerdict(
        "few",
        f"too few pairs: {needed:,} would do",
        f"{where} are better than {than}{rest}, but that may be chance.",
        f"Do not use them yet: check on more pairs (--held-out {needed}).",
        needed,
    )


def found_sets(checks: dict[str, Any]) -> dict[str, Any]:
    """Return the sets of the search, in their order, without those they are compared with."""
    return {name: one for name, one in checks.items() if not name.startswith(_COMPARED)}


def _others(found: dict[str, Any], checks: dict[str, Any], gain: dict[str, Any]) -> str:
    """How random heads and the best full layer do, where they do as well."""
    random = [one["gain"]["value"] for name, one in checks.items() if name.startswith("random") and one["gain"]]
    known = {"random heads": fmean(random)} if random else {}
    layer = found["search"].get("best_layer", {}).get("name")
    if layer in checks and checks[layer]["gain"]:
        known[f"all heads of {layer}"] = checks[layer]["gain"]["value"]
    parts = [
        f"{name} ({write_value(value, gain['ci95'], '+')})" for name, value in known.items() if value >= gain["value"]
    ]
    return f"; {' and '.join(parts)} do as well or better" if parts else ""


def _minutes(found: dict[str, Any], pairs: int) -> str:
    """What a search on so many pairs would take, by this one."""
    seconds = found["search"].get("seconds")
    if not seconds:
        return ""
    minutes = seconds / 60 * pairs / len(found["search"]["pairs"])
    return f", about {max(1, round(minutes))} min here"


def _many(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
