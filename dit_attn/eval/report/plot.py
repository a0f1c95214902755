"""Line and point plots of a page as data with pixel coordinates; ``parts.html`` draws them as SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Line:
    """A path with its CSS class, and its color where the class has none."""

    d: str
    kind: str
    color: str = ""


@dataclass(frozen=True)
class Point:
    """A dot in pixels with its CSS class, the color where the class has none, and what it says on hover."""

    x: float
    y: float
    kind: str
    color: str = ""
    title: str = ""


@dataclass
class Plot:
    """A plot over two linear axes.

    Attributes:
        label: what a screen reader says.
        x_range, y_range: values at the ends of the axes.
        x_title, y_title: of the axes.
        width, height, left, bottom: pixels of the drawing, and of the margins with the numbers.
        inset: pixels between the vertical axis and ``x_range[0]``, and between ``x_range[1]`` and the right end.
    """

    label: str
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    x_title: str
    y_title: str = ""
    width: int = 560
    height: int = 300
    left: int = 58
    bottom: int = 44
    inset: int = 0
    x_ticks: list[tuple[float, str]] = field(default_factory=list)
    y_ticks: list[tuple[float, str]] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)
    points: list[Point] = field(default_factory=list)

    @property
    def right(self) -> int:
        """Pixel of the right end of the horizontal axis."""
        return self.width - 24

    @property
    def top(self) -> int:
        """Pixel of the upper end of the vertical axis."""
        return 12

    @property
    def floor(self) -> int:
        """Pixel of the horizontal axis."""
        return self.height - self.bottom

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Convert values to pixels."""
        (x0, x1), (y0, y1) = self.x_range, self.y_range
        start, end = self.left + self.inset, self.right - self.inset
        across = start + (x - x0) / ((x1 - x0) or 1.0) * (end - start)
        return round(across, 1), round(self.floor - (y - y0) / ((y1 - y0) or 1.0) * (self.floor - self.top), 1)

    def ticks(self, x: Callable[[float], str] | None, y: Callable[[float], str], count: int = 5) -> None:
        """Put about ``count`` round ticks on each axis, written by ``x`` (no ticks for ``None``) and ``y``."""
        if x is not None:
            self.x_ticks += [(self.at(value, 0)[0], x(value)) for value in round_ticks(*self.x_range, count)]
        self.y_ticks += [(self.at(0, value)[1], y(value)) for value in round_ticks(*self.y_range, count)]

    def line(self, values: Sequence[tuple[float, float]], kind: str, color: str = "") -> None:
        """Draw a line through ``values``."""
        places = "L".join("{},{}".format(*self.at(x, y)) for x, y in values)
        self.lines.append(Line(f"M{places}", kind, color))

    def level(self, y: float, kind: str) -> None:
        """Draw a horizontal line over the full width at ``y``."""
        self.lines.append(Line(f"M{self.left},{self.at(0, y)[1]}H{self.right}", kind))

    def point(self, x: float, y: float, kind: str, color: str = "", title: str = "") -> None:
        """Draw a dot."""
        self.points.append(Point(*self.at(x, y), kind, color, title))


def round_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return about ``count`` multiples of 1, 2 or 5 times a power of ten in [low, high]."""
    width = high - low
    if width <= 0.0 or not math.isfinite(width):
        return [low]
    power = 10.0 ** math.floor(math.log10(width / count))
    steps = [power * factor for factor in (1, 2, 5, 10)]
    step = min(steps, key=lambda step: abs(math.floor(width / step) + 1 - count))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(place * step, 12) for place in range(first, last + 1)]
