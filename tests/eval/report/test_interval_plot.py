"""Interval plots: places follow the values, and the line that decides is always there."""

from __future__ import annotations

import math

from dit_attn.eval.report.interval_plot import Axis
from dit_attn.eval.report.plot import round_ticks


def test_the_axis_holds_all_values_and_the_line() -> None:
    axis = Axis.over("speed-up", [1.2, 1.6], "{:g}x".format, (1.0, "dense"))
    assert axis.low < 1.0 and axis.high > 1.6
    assert 0 < axis.place(1.0) < axis.place(1.2) < axis.place(1.6) < 100
    assert "1x" in [text for _, text in axis.ticks]


def test_intervals_that_are_infinite_end_at_the_ends() -> None:
    axis = Axis.over("x", [1.0, math.inf, -math.inf], "{:g}".format)
    one = axis.interval(1.0, -math.inf, math.inf, "?")
    assert (one.low, one.high) == (0.0, 100.0) and one.dot == 50.0


def test_an_axis_stays_within_its_limits() -> None:
    assert Axis.over("speed-up", [0.01, 3.0], "{:g}x".format, limits=(0.0, 9.0)).low == 0.0


def test_ticks_are_round_numbers_inside_the_range() -> None:
    assert round_ticks(0.82, 1.26, 4) == [0.9, 1.0, 1.1, 1.2]
    assert round_ticks(0.0, 1.0, 6) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert round_ticks(-103.0, 57.0, 4) == [-100.0, -50.0, 0.0, 50.0]
    assert round_ticks(3.0, 3.0) == [3.0]
