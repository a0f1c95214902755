"""Heat maps of a page as data: colors, the number of every cell, the extremes in words; ``parts.html`` draws them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

# Dark to light, even in lightness and told apart with any color vision: points of matplotlib's cividis.
SCALE = ((0, 34, 78), (53, 69, 108), (102, 105, 112), (148, 142, 119), (200, 184, 102), (254, 232, 56))
MOST_CELLS = 6000  # per map; beyond that neighboring columns share a cell
LEVELS = 48  # colors of a map, one path each
ROUND = (1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0)  # where a scale may end, times a power of ten

Values = Sequence[Sequence[float | None]]


@dataclass(frozen=True)
class HeatMap:
    """A map to draw; without ``paths`` it has no values.

    Attributes:
        title: caption.
        label: name for a screen reader.
        words: unit, mean and extremes.
        rows, columns: their names, first on top and on the left.
        low, high: values of the darkest and the lightest color, as text.
        width, height: cells.
        paths: (color, SVG path of all its cells).
        data: JSON of ``rows``, ``columns`` and ``values``, from which the page tells the number of a cell.
    """

    title: str
    label: str
    words: str = ""
    rows: Sequence[str] = ()
    columns: Sequence[str] = ()
    low: str = ""
    high: str = ""
    width: int = 0
    height: int = 0
    paths: Sequence[tuple[str, str]] = ()
    data: dict[str, str] = field(default_factory=dict)


def heat_map(
    values: Values,
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    unit: str = "",
    scale: tuple[float, float] | None = None,
    label: str = "",
) -> HeatMap:
    """Prepare a table of numbers as a heat map.

    One path a color, not one element a cell, so that a page can hold many.

    Args:
        values: rows x columns; ``None`` and NaN are holes.
        rows, columns: their names, first on top and on the left.
        title: caption.
        unit: of the values, in a few words.
        scale: values of the darkest and the lightest color; ``None``: 0 (or the least value below) to the largest.
        label: name for a screen reader, ``title`` by default.
    """
    clean = [[None if x is None or math.isnan(x) else float(x) for x in row] for row in values]
    numbers = list(known(clean))
    if not numbers:
        return HeatMap(title, label or title)
    low, high = scale or (min(0.0, *numbers), round_up(max(numbers)) if min(numbers) >= 0 else max(numbers))
    joined, width = _join_columns(clean), _columns_per_cell(clean)
    groups = [columns[x : x + width] for x in range(0, len(columns), width)]
    names = [group[0] if len(group) == 1 else f"{group[0]} to {group[-1]}" for group in groups]
    data = {"rows": list(rows), "columns": names, "values": [[_three_digits(x) for x in row] for row in joined]}
    parts = [unit, f"mean {sum(numbers) / len(numbers):.3g}, {_extremes(clean, rows, columns)}"]
    return HeatMap(
        title,
        label or title,
        "; ".join(part for part in parts if part),
        rows,
        columns,
        f"{low:.3g}",
        f"{high:.3g}",
        len(joined[0]),
        len(joined),
        _paths(joined, low, high),
        {key: json.dumps(value, separators=(",", ":")) for key, value in data.items()},
    )


def known(values: Values) -> Iterator[float]:
    """Yield the values that are there."""
    return (value for row in values for value in row if value is not None)


def round_up(top: float) -> float:
    """Return ``top`` or a little more, a round number; 1 for nothing."""
    if top <= 0.0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(top))
    return next(round(step * power, 12) for step in ROUND if step * power >= top * (1 - 1e-9))


def rgb(share: float) -> str:
    """Return the color of a value in [0, 1]."""
    place = min(max(share, 0.0), 1.0) * (len(SCALE) - 1)
    low = min(int(place), len(SCALE) - 2)
    mixed = (round(a + (b - a) * (place - low)) for a, b in zip(SCALE[low], SCALE[low + 1], strict=True))
    return "#" + "".join(f"{value:02x}" for value in mixed)


def level_color(value: float, low: float, high: float) -> str:
    """Return the color of a cell: one of ``LEVELS`` between those of ``low`` and ``high``."""
    place = min(max((value - low) / ((high - low) or 1.0), 0.0), 1.0)
    return rgb(round(place * (LEVELS - 1)) / (LEVELS - 1))


def _paths(values: Values, low: float, high: float) -> list[tuple[str, str]]:
    """(color, path of all cells of the color)."""
    cells: dict[str, list[str]] = {}
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            if value is not None:
                cells.setdefault(level_color(value, low, high), []).append(f"M{x} {y}h1v1h-1z")
    return [(color, "".join(parts)) for color, parts in cells.items()]


def _extremes(values: Values, rows: Sequence[str], columns: Sequence[str]) -> str:
    """Where a map is least and largest, in words."""
    places = [(value, y, x) for y, row in enumerate(values) for x, value in enumerate(row) if value is not None]
    ends = {"least": min(places), "largest": max(places, key=lambda place: place[0])}
    return ", ".join(f"{word} {value:.3g} in {rows[y]}, {columns[x]}" for word, (value, y, x) in ends.items())


def _three_digits(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.3g}")


def _join_columns(values: Values) -> Values:
    """The table with neighboring columns averaged until it is small enough to draw."""
    width = _columns_per_cell(values)
    if width == 1:
        return values
    joined = []
    for row in values:
        parts = [[value for value in row[x : x + width] if value is not None] for x in range(0, len(row), width)]
        joined.append([sum(part) / len(part) if part else None for part in parts])
    return joined


def _columns_per_cell(values: Values) -> int:
    return max(1, math.ceil(len(values) * len(values[0]) / MOST_CELLS))
