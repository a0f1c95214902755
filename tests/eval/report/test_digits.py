"""Figures have the digits that their interval allows."""

from __future__ import annotations

import math

import pytest

from dit_attn.eval.report.digits import decimals, write_figure, write_interval, write_value


@pytest.mark.parametrize(
    ("half", "places"), [(0.13, 2), (0.5, 1), (0.049, 3), (0.05, 2), (1.0, 1), (4.0, 1), (6.0, 0), (40.0, 0), (1e-9, 4)]
)
def test_one_digit_of_the_uncertainty_is_written_two_where_it_is_small(half: float, places: int) -> None:
    assert decimals(half) == places


def test_an_interval_decides_over_the_digits() -> None:
    assert write_value(1.0234, [0.9, 1.16]) == "1.02" and write_interval([0.9, 1.16]) == "0.90 to 1.16"
    assert write_figure({"value": -0.25, "ci95": [-1.09, 0.59]}, "+") == ("-0.2", "-1.1 to +0.6")
    assert write_figure({"value": 0.1, "ci95": [-0.0025, 0.2]}, "+") == ("+0.10", "0.00 to +0.20")  # no -0.00
    assert decimals(0.001, most=2) == 2


def test_without_an_interval_three_digits_are_written() -> None:
    assert write_value(93.1634, None) == "93.2" and write_value(0.5, [0.5, 0.5]) == "0.5"
    assert write_interval([0.5, 0.5]) == "" == write_interval([0.0, math.inf])
    assert write_figure(None) == ("-", "")
