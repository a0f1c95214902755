"""Whether heads that a search found should be used."""

from __future__ import annotations

from typing import Any

import pytest

from dit_attn.eval.report.search_verdict import search_verdict


def figure(value: float, half: float, pairs: int = 12) -> dict[str, Any]:
    return {"value": value, "ci95": [value - half, value + half], "n": pairs}


def found(gain: Any, pairs: int = 12, random: float | None = None, layer: float | None = None) -> dict[str, Any]:
    checks: dict[str, Any] = {"none": {"gain": None}, "round 1": {"gain": figure(9.0, 0.1)}, "round 2": {"gain": gain}}
    about: dict[str, Any] = {"pairs": [["a", 1]] * 4, "held_out": [["b", 2]] * pairs, "seconds": 300.0}
    if layer is not None:
        checks["layer 3"], about["best_layer"] = {"gain": figure(layer, 0.5)}, {"name": "layer 3"}
    if random is not None:
        checks["random 1"] = {"gain": figure(random, 0.5)}
    return {"checks": {"searched": checks, "held_out": checks}, "search": about}


@pytest.mark.parametrize(
    ("gain", "kind", "chip"),
    [
        (figure(2.0, 1.0), "good", "better by 2.0"),
        (figure(-2.0, 1.0), "bad", "worse than no guidance"),
        (figure(-0.25, 0.84), "none", "no gain"),
        (None, "bad", "no finite score"),
    ],
)
def test_the_interval_over_the_held_out_pairs_decides(gain: Any, kind: str, chip: str) -> None:
    one = search_verdict(found(gain))
    assert (one.kind, one.chip, one.use) == (kind, chip, kind == "good")


def test_a_gain_that_may_be_chance_asks_for_the_pairs_that_would_show_it() -> None:
    one = search_verdict(found(figure(1.0, 1.5)))
    assert one.kind == "few" and not one.use and one.chip == f"too few pairs: {one.pairs} would do"
    assert f"--held-out {one.pairs}" in one.advice and one.pairs > 12
    assert search_verdict(found(figure(1.0, 3.0))).pairs > 2 * one.pairs
    assert search_verdict(found(figure(1.0, 0.9, 2), pairs=2)).kind == "few"  # two pairs prove nothing


def test_heads_without_a_gain_are_not_recommended_and_the_next_search_is() -> None:
    one = search_verdict(found(figure(-0.25, 0.84, 2), pairs=2, random=-0.24, layer=-3.0))
    text = f"{one.sentence} {one.advice}"
    assert text.startswith("On 2 held-out pairs the heads do not beat no guidance (-0.2, 95 % ")
    assert "random heads (-0.2) do as well or better" in text and "layer 3" not in text
    assert "Do not use them yet" in text and "(--pairs 8 --held-out 8, about 10 min here)" in text


def test_heads_that_were_not_checked_are_not_recommended() -> None:
    data = found(figure(2.0, 0.1))
    del data["checks"]["held_out"]
    one = search_verdict(data)
    assert not one.use and "best of many on 4 pairs" in one.sentence and "--held-out 4" in one.advice
