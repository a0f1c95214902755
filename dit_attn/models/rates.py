"""Shares with their intervals, and how a contact sheet marks what is right and wrong."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

RIGHT, WRONG = (60, 160, 60), (200, 30, 30)  # borders of a contact sheet


def interval(right: int, total: int) -> list[float]:
    """Compute the 95 % Wilson score interval of a proportion (Wilson 1927)."""
    if total == 0:
        return [0.0, 1.0]
    z, p = 1.959964, right / total
    center = (p + z * z / (2 * total)) / (1 + z * z / total)
    half = z * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total)) / (1 + z * z / total)
    return [round(center - half, 4), round(center + half, 4)]


def rate(flags: Iterable[bool]) -> dict[str, Any]:
    """Compute the share of true flags, 0 without any, with its 95 % interval."""
    values = list(flags)
    share = sum(values) / len(values) if values else 0.0
    return {
        "accuracy": round(share, 4),
        "right": sum(values),
        "of": len(values),
        "ci95": interval(sum(values), len(values)),
    }
