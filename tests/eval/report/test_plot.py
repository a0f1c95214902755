"""Plots: values lie where the axes say."""

from __future__ import annotations

from dit_attn.eval.report.plot import Plot


def plot() -> Plot:
    return Plot("label", (0.0, 2.0), (-1.0, 1.0), "x", "y", width=224, height=156, left=100, bottom=44)


def test_the_ends_of_the_ranges_lie_at_the_ends_of_the_axes() -> None:
    one = plot()
    assert one.at(0.0, -1.0) == (100, 112) and one.at(2.0, 1.0) == (200, 12) and one.at(1.0, 0.0) == (150, 62)


def test_an_inset_keeps_points_off_the_ends() -> None:
    one = plot()
    one.inset = 10
    assert one.at(0.0, 0.0)[0] == 110 and one.at(2.0, 0.0)[0] == 190


def test_ticks_are_even_and_lines_pass_through_their_values() -> None:
    one = plot()
    one.ticks("{:.1f}".format, "{:.0%}".format, count=3)
    assert one.x_ticks == [(100, "0.0"), (150, "1.0"), (200, "2.0")]
    assert one.y_ticks == [(112, "-100%"), (62, "0%"), (12, "100%")]
    one.line([(0.0, -1.0), (2.0, 1.0)], "best")
    one.level(0.0, "even")
    assert [line.d for line in one.lines] == ["M100.0,112.0L200.0,12.0", "M100,62.0H200"]


def test_a_range_of_one_value_is_no_error() -> None:
    one = Plot("label", (1.0, 1.0), (0.0, 0.0), "x")
    assert one.at(1.0, 0.0) == (one.left, one.floor)
