"""Intervals are paired, and the words follow from them: what loses is said."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from dit_attn.pipelines.anomaly.benchmark.figures import (
    interval,
    sentences,
    tabulate,
    trace_sentences,
    verdicts,
)


def _rows():
    rng, rows = np.random.default_rng(0), []
    gain = {"none": 0.0, "cutpaste": -0.2, "crop-paste": 0.15, "perlin": 0.0, "generated": 0.3}
    for task, group in (("nut+hole", "a"), ("nut+stain", "a"), ("weave+hole", "b")):
        for seed in range(4):
            base = rng.uniform(0.2, 0.6)  # hard and easy trials: only pairs tell arms apart
            for arm, more in gain.items():
                noise = rng.normal(0, 0.2 if arm == "perlin" else 0.01)
                decoded = 0.9 if arm == "generated" else 0.5 + noise / 50
                rows.append({
                    "task": task, "group": group, "seed": seed, "shots": 5, "arm": arm,
                    "scores": {"pixel_ap": base + more + noise}, "pairs": {"count": 8},
                    "traces": {"untouched": 0.5, "decoded": decoded, "painted": 0.5},
                })  # fmt: skip
    return rows


def test_intervals_are_students():
    values = [0.1, 0.3, 0.25, 0.4]
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    found = interval(values)
    assert found["value"] == pytest.approx(np.mean(values)) and found["ci95"] == pytest.approx(list(expected))
    assert interval([0.5]) == {"value": 0.5, "ci95": None, "n": 1}


def test_differences_are_paired_and_what_loses_is_said():
    table = tabulate(_rows())
    wide = next(row for row in table if row["arm"] == "crop-paste" and row["group"] == "a")
    figure = wide["against"]["none"]["pixel_ap"]
    low, high = figure["ci95"]
    own = wide["scores"]["pixel_ap"]["ci95"]
    assert figure["n"] == 8 and high - low < 0.05 < own[1] - own[0]
    found = {(v["group"], v["arm"], v["base"]): v["verdict"] for v in verdicts(table)}
    assert found["a", "generated", "none"] == found["a", "generated", "crop-paste"] == "helps"
    assert found["b", "cutpaste", "none"] == "hurts" and found["b", "perlin", "none"] == "undecided"
    assert ("a", "perlin", "crop-paste") not in found
    words = sentences(verdicts(table))
    assert any(line.startswith("B, worse than the shots alone: cutpaste (5 shots, -0.") for line in words)
    assert any("better than crop-and-paste of the shots: generated" in line for line in words)


def test_a_segmenter_of_traces_is_named():
    lines = trace_sentences(tabulate(_rows()))
    assert len(lines) == 2 and all("generated marks normal images that were decoded" in line for line in lines)
    assert "pixel AUROC 0.90 against 0.50 untouched" in lines[0]
