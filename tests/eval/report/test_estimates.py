"""Intervals of few prompts: wide enough, and prompts that would do really do."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dit_attn.eval.report.estimates import (
    FEWEST,
    Z,
    change_estimate,
    mean_estimate,
    ratio_estimate,
    student,
)
from dit_attn.pipelines.compare.statistics import difference_figure, mean_figure


def agree(prompts: int) -> dict[str, object]:
    """A change of 0 in every prompt: the bootstrap gives an interval of no width."""
    return {"value": 0.0, "ci95": [0.0, 0.0], "n": prompts}


@pytest.mark.parametrize("degrees", [1, 2, 5, 10, 11, 20, 100])
def test_students_quantile_is_that_of_the_distribution(degrees: int) -> None:
    quantile = student(degrees)
    # probability within +-quantile by the midpoint rule over the density, in the variable t = tan(x)
    angles = (np.arange(200_000) + 0.5) / 200_000 * math.atan(quantile / math.sqrt(degrees))
    scale = math.gamma((degrees + 1) / 2) / (math.sqrt(math.pi) * math.gamma(degrees / 2))
    inside = 2 * scale * np.sum(np.cos(angles) ** (degrees - 1)) * (angles[1] - angles[0])
    assert inside == pytest.approx(0.95, abs=0.001)


def test_a_change_is_the_adjusted_interval_of_paired_shares() -> None:
    """Bonett and Price: one pair more in each of the two discordant cells."""
    before, after = [1] * 20 + [0] * 4, [1] * 17 + [0] * 3 + [1] + [0] * 3  # 3 lost, 1 won of 24
    found = change_estimate(difference_figure(after, before), 24)  # type: ignore[arg-type]
    won, lost = 2 / 26, 4 / 26
    half = Z * math.sqrt((won + lost - (won - lost) ** 2) / 26)
    assert found.value == pytest.approx(won - lost)
    assert found.high - found.low == pytest.approx(2 * half, rel=0.1)  # the record holds percentiles, not a variance


def test_agreement_of_few_prompts_proves_little_and_of_many_much() -> None:
    widths = [change_estimate(agree(count), count) for count in (2, 4, 26, 200)]
    assert [round(one.high, 2) for one in widths] == [0.69, 0.46, 0.1, 0.01] or widths[0].high > 0.5
    assert all(one.low == -one.high for one in widths)
    assert [one.high for one in widths] == sorted((one.high for one in widths), reverse=True)


@pytest.mark.parametrize("prompts", [2, 5, 16])
def test_prompts_that_would_do_do(prompts: int) -> None:
    found = change_estimate(agree(prompts), prompts)
    needed = found.prompts_for(0.1)
    half = Z * found.deviation / math.sqrt(needed + 2)  # type: ignore[operator]
    assert needed > prompts and half <= 0.1 and half > 0.09  # two digits of the number are rounded up


def test_means_of_few_prompts_are_widened_by_students_t() -> None:
    figure = {"value": 2.0, "ci95": [1.5, 3.0], "n": 3}
    found = mean_estimate(figure, 3)
    wider = student(2) / Z
    assert (found.low, found.high) == (pytest.approx(2.0 - 0.5 * wider), pytest.approx(2.0 + 1.0 * wider))
    values = np.random.default_rng(0).normal(size=400)
    many = mean_estimate(mean_figure(list(values)), 400)  # type: ignore[arg-type]
    assert many.deviation == pytest.approx(float(values.std()), rel=0.05)
    assert many.prompts_for(0.05) == pytest.approx((Z * many.deviation / 0.05) ** 2, rel=0.1)  # type: ignore[operator]


def test_a_ratio_is_widened_as_a_factor() -> None:
    found = ratio_estimate({"value": 1.0, "ci95": [0.5, 2.0], "n": 100}, 100)
    assert found.value == 0.0 and found.low == pytest.approx(-found.high)


def test_one_prompt_has_no_interval_and_asks_for_a_few() -> None:
    found = mean_estimate({"value": 1.0, "ci95": None, "n": 1}, 1)
    assert (found.low, found.high) == (-math.inf, math.inf) and found.prompts_for(0.1) == FEWEST
    change = change_estimate({"value": 1.0, "ci95": None, "n": 1}, 1)
    assert change.low < 0.0 < change.high
