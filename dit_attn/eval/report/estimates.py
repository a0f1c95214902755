"""Intervals that few prompts allow, from the figures of a record, and how many prompts a decision would need.

A bootstrap over a handful of prompts is too narrow, and of no width where all of them agree. Means are widened by
Student's t (Hesterberg, What Teachers Should Know About the Bootstrap, 2015, section 3.2); differences of shares get
one prompt more on each side (Bonett and Price, Adjusted Wald Intervals for a Difference of Binomial Proportions, 2012).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

Z = 1.96  # of a normal distribution, 95 %
FEWEST = 4  # prompts or pairs to ask for where a record shows no spread
_STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)  # by degrees of freedom, from 1


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts with its 95 % interval.

    Attributes:
        value: the mean.
        low, high: ends of the interval; infinite where one prompt says nothing about the spread.
        deviation: standard deviation of one prompt; ``None`` where it is unknown.
        prompts: number of prompts.
        extra: prompts that were added on the assumption that they differ.
    """

    value: float
    low: float
    high: float
    deviation: float | None
    prompts: int
    extra: int = 0

    def prompts_for(self, gap: float) -> int:
        """Return how many prompts would bring the end of the interval within ``gap`` of the value.

        The value and the deviation are taken to stay. Always more than there are.
        """
        if self.deviation is None:
            return max(FEWEST, self.prompts + 1)
        count = math.ceil((Z * self.deviation / gap) ** 2) + (-self.extra if self.extra else 2)  # 2: t over z
        return max(_round_up(count), self.prompts + 1)


def mean_estimate(figure: dict[str, Any], prompts: int) -> Estimate:
    """Return the estimate of a recorded mean.

    Args:
        figure: ``value`` and ``ci95`` (``None`` without).
        prompts: number of resampled groups.
    """
    value, interval = figure["value"], figure["ci95"]
    if interval is None or prompts < 2:
        return Estimate(value, -math.inf, math.inf, None, prompts)
    low, high = interval
    wider = student(prompts - 1) / Z
    deviation = (high - low) / (2 * Z) * math.sqrt(prompts)
    return Estimate(value, value - (value - low) * wider, value + (high - value) * wider, deviation, prompts)


def ratio_estimate(figure: dict[str, Any], prompts: int) -> Estimate:
    """Return the estimate of the logarithm of a recorded ratio; arguments as in :func:`mean_estimate`."""
    interval = figure["ci95"] and [math.log(end) for end in figure["ci95"]]
    return mean_estimate({"value": math.log(figure["value"]), "ci95": interval}, prompts)


def change_estimate(figure: dict[str, Any], prompts: int) -> Estimate:
    """Return the estimate of a recorded mean difference of shares, with one prompt won and one lost added.

    Args:
        figure: ``value`` in [-1, 1] and ``ci95`` (``None`` without).
        prompts: number of resampled groups.
    """
    value = figure["value"]
    low, high = figure["ci95"] or (value, value)
    squares = prompts * (((high - low) / (2 * Z)) ** 2 * prompts + value**2) + 2.0
    count = prompts + 2
    mean = value * prompts / count
    deviation = math.sqrt(squares / count - mean**2)
    half = Z * deviation / math.sqrt(count)
    return Estimate(mean, max(mean - half, -1.0), min(mean + half, 1.0), deviation, prompts, extra=2)


def student(degrees: int) -> float:
    """Return the 97.5 % quantile of Student's t distribution, to 1 %."""
    return _STUDENT[degrees - 1] if degrees <= len(_STUDENT) else Z + 2.7 / degrees


def _round_up(count: int) -> int:
    """Two digits are enough for a number that is estimated."""
    step = max(1, 10 ** (len(str(count)) - 2))
    return math.ceil(count / step) * step
