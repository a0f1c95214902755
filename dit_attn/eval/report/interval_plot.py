"""Intervals of many rows, each on a line of its own, as data in percent of the width; ``parts.html`` draws them.

Rows never hide each other, and the text keeps its size on a narrow screen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from dit_attn.eval.report.plot import round_ticks

ROOM = 0.04  # of the range, left free at both ends


@dataclass(frozen=True)
class Interval:
    """A value with its interval; places in percent of the width of the axis."""

    dot: float
    low: float
    high: float
    text: str


@dataclass(frozen=True)
class IntervalRow:
    """A row: its label and an interval on every axis, ``None`` where there is none."""

    label: str
    color: str
    cells: Sequence[Interval | None]


@dataclass
class Axis:
    """A horizontal axis with round ticks.

    Attributes:
        title: what is drawn.
        low, high: values at the ends.
        write: writes a tick.
        mark: value of the line that decides, with its meaning; always inside the axis.
        ticks: (percent of the width, text).
    """

    title: str
    low: float
    high: float
    write: Callable[[float], str]
    mark: tuple[float, str] | None = None
    ticks: Sequence[tuple[float, str]] = field(init=False)

    def __post_init__(self) -> None:
        self.ticks = [(self.place(value), self.write(value)) for value in round_ticks(self.low, self.high, 4)]

    @classmethod
    def over(
        cls,
        title: str,
        values: Sequence[float],
        write: Callable[[float], str],
        mark: tuple[float, str] | None = None,
        least: float = 0.2,
        limits: tuple[float, float] = (-math.inf, math.inf),
    ) -> Axis:
        """Make an axis within ``limits``, at least ``least`` wide, that holds all finite ``values`` and the mark."""
        known = [value for value in (*values, *([mark[0]] if mark else [])) if math.isfinite(value)] or [0.0]
        low, high = min(known), max(known)
        room = ROOM * (high - low) + max(0.0, least - (high - low)) / 2
        return cls(title, max(low - room, limits[0]), min(high + room, limits[1]), write, mark)

    def place(self, value: float) -> float:
        """Return the place of a value in percent of the width; values outside lie at the end."""
        share = (value - self.low) / ((self.high - self.low) or 1.0)
        return round(100.0 * min(max(share, 0.0), 1.0), 2)

    def interval(self, value: float, low: float, high: float, text: str) -> Interval:
        """Place a value and its interval; infinite ends lie at the ends of the axis."""
        return Interval(self.place(value), self.place(low), self.place(high), text)


@dataclass(frozen=True)
class IntervalPlot:
    """Axes next to each other and the rows over them."""

    label: str
    axes: Sequence[Axis]
    rows: Sequence[IntervalRow]
