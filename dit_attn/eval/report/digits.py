"""Write a figure with the digits that its interval allows."""

from __future__ import annotations

import math
from typing import Any

Interval = tuple[float, float] | list[float] | None


def decimals(half: float, most: int = 4) -> int:
    """Return the digits after the point of a number that is known to ``half``.

    As many as show one digit of ``half``, or two where it begins below 5.
    """
    if not math.isfinite(half) or half <= 0.0:
        return min(2, most)
    place = -math.floor(math.log10(half) + 1e-9)
    return min(max(place + (half * 10.0**place < 5.0), 0), most)


def write_value(value: float, interval: Interval, sign: str = "") -> str:
    """Write a value with as many digits as its interval allows; three significant ones without an interval.

    Args:
        value: the number.
        interval: its 95 % interval, or ``None``.
        sign: ``"+"`` to write a plus, too.
    """
    if interval is None or interval[0] == interval[1] or not all(map(math.isfinite, interval)):
        return f"{value:{sign}.3g}"
    return _fixed(value, decimals((interval[1] - interval[0]) / 2), sign)


def write_interval(interval: Interval, sign: str = "") -> str:
    """Write the ends of an interval as ``"0.90 to 1.16"``; ``""`` where there is none or it has no width."""
    if interval is None or interval[0] == interval[1] or not all(map(math.isfinite, interval)):
        return ""
    places = decimals((interval[1] - interval[0]) / 2)
    return " to ".join(_fixed(end, places, sign) for end in interval)


def write_figure(figure: dict[str, Any] | None, sign: str = "") -> tuple[str, str]:
    """Return value and interval of a recorded figure as text; ``("-", "")`` where there is none."""
    if figure is None or figure["value"] is None:
        return "-", ""
    return write_value(figure["value"], figure["ci95"], sign), write_interval(figure["ci95"], sign)


def _fixed(value: float, places: int, sign: str) -> str:
    """With so many digits after the point; zero has no sign."""
    return f"{value:{sign}.{places}f}" if round(value, places) else f"{0.0:.{places}f}"
