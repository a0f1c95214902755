"""From measurements to a table with intervals, and to plain words on what helps, what loses, what is undecided."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dit_attn.pipelines.anomaly.benchmark.arms import GENERATED, NONE

METRIC = "pixel_ap"  # that the verdicts go by: AUROC saturates
RIVAL = "crop-paste"
CONFIDENCE = 0.95
RULE = (
    "An arm helps (hurts) where the 95 % interval of its paired difference in pixel AP to the shots alone lies above "
    "(below) 0; a pair is the same product, defect, seed, shots, first weights and test. Intervals are Student's, over "
    "these pairs, and not corrected for the number of arms."
)


def interval(values: Sequence[float]) -> dict[str, Any]:
    """Return the mean of values with its 95 % interval by Student's t: ``value``, ``ci95``, ``n``."""
    from scipy import stats

    found = np.asarray(values, float)
    mean, count = float(found.mean()), len(found)
    if count < 2:
        return {"value": mean, "ci95": None, "n": count}
    error = float(found.std(ddof=1)) / count**0.5
    half = float(stats.t.ppf(0.5 + CONFIDENCE / 2, count - 1)) * error
    return {"value": mean, "ci95": [mean - half, mean + half], "n": count}


def tabulate(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Average measurements by group, shots and arm, with paired differences to the shots alone and to crop-and-paste.

    Args:
        rows: measurements.

    Returns:
        One row per group, shots and arm: ``scores`` and ``against`` by metric, ``traces``, and of generated arms
        ``accepted``, the pairs that passed their gate per trial.
    """
    groups = dict.fromkeys((row["group"], row["shots"], row["arm"]) for row in rows)
    by_key = {(row["task"], row["seed"], row["shots"], row["arm"]): row for row in rows}
    out = []
    for group, shots, arm in sorted(groups, key=lambda one: (one[0], one[1])):
        own = [row for row in rows if (row["group"], row["shots"], row["arm"]) == (group, shots, arm)]
        names = list(own[0]["scores"])
        entry: dict[str, Any] = {"group": group, "shots": shots, "arm": arm, "against": {}}
        entry["scores"] = {name: interval([row["scores"][name] for row in own]) for name in names}
        for base in (NONE, RIVAL):
            both = [(row, by_key.get((row["task"], row["seed"], shots, base))) for row in own]
            paired = [(row["scores"], other["scores"]) for row, other in both if other is not None]
            if arm != base and paired:
                entry["against"][base] = {name: interval([a[name] - b[name] for a, b in paired]) for name in names}
        if own[0]["traces"]:
            entry["traces"] = {name: interval([row["traces"][name] for row in own]) for name in own[0]["traces"]}
            change = [row["traces"]["decoded"] - row["traces"]["untouched"] for row in own]
            entry["traces"]["decoded - untouched"] = interval(change)
            change = [row["traces"]["painted"] - row["traces"]["untouched"] for row in own]
            entry["traces"]["painted - untouched"] = interval(change)
        if arm in GENERATED:
            entry["accepted"] = interval([row["pairs"]["count"] for row in own])
        out.append(entry)
    return out


def verdicts(table: Sequence[dict[str, Any]], metric: str = METRIC) -> list[dict[str, Any]]:
    """Say of every arm whether it helps, against the shots alone and, of generated ones, against crop-and-paste.

    Args:
        table: of :func:`tabulate`.
        metric: that decides.

    Returns:
        By group, shots, arm and ``base``: ``verdict`` (``"helps"``, ``"hurts"``, ``"undecided"``) and the figure.
    """
    out = []
    for row in table:
        for base, figures in row["against"].items():
            if base == RIVAL and row["arm"] not in GENERATED:
                continue
            figure, found = figures[metric], "undecided"
            if figure["ci95"] is not None:
                low, high = figure["ci95"]
                found = "helps" if low > 0 else ("hurts" if high < 0 else "undecided")
            place = {key: row[key] for key in ("group", "shots", "arm")}
            out.append({**place, "base": base, "verdict": found, "difference": figure})
    return out


def sentences(found: Sequence[dict[str, Any]]) -> list[str]:
    """Write verdicts in words: what helps, what loses, what is undecided, by group and rival."""
    lines = []
    words = {NONE: "the shots alone", RIVAL: "crop-and-paste of the shots"}
    verbs = {"helps": "better than", "hurts": "worse than", "undecided": "not told apart from"}
    for group in dict.fromkeys(row["group"] for row in found):
        for base in (NONE, RIVAL):
            for verdict, verb in verbs.items():
                own = [row for row in found if (row["group"], row["base"], row["verdict"]) == (group, base, verdict)]
                said = [f"{row['arm']} ({count_shots(row)}, {row['difference']['value']:+.3f})" for row in own]
                if said:
                    lines.append(f"{group.capitalize()}, {verb} {words[base]}: {', '.join(said)}")
    return lines


def count_shots(row: dict[str, Any]) -> str:
    """Write how many shots a row is of."""
    return f"{row['shots']} shot" + "s" * (row["shots"] != 1)


def trace_sentences(table: Sequence[dict[str, Any]]) -> list[str]:
    """Say whether segmenters mark normal images that went through the model."""
    lines = []
    for row in table:
        for kind in ("decoded", "painted"):
            figure = row.get("traces", {}).get(f"{kind} - untouched")
            if figure and figure["ci95"] is not None and figure["ci95"][0] > 0.02:
                found, before = (row["traces"][name]["value"] for name in (kind, "untouched"))
                lines.append(
                    f"{row['group'].capitalize()}, {count_shots(row)}: {row['arm']} marks normal images that were "
                    f"{kind}, pixel AUROC {found:.2f} against {before:.2f} untouched"
                )
    return lines
