"""From the rounds of a model benchmark to its rows: medians, ratios within rounds, ceilings, verdicts."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

TARGET = 0.6  # attention is to be this part of 1 / density faster


@dataclass
class Times:
    """One entry a round.

    Attributes:
        wall: seconds.
        cpu: seconds of the process's own threads, 0 where an accelerator does the work; on a busy machine their ratios
            say more than those of the wall. Figures of them are ``None`` where they are 0.
    """

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def add(self, taken: tuple[float, float]) -> None:
        """A round's wall and processor time."""
        self.wall.append(taken[0])
        self.cpu.append(taken[1])

    def mixed(self, other: Times, weight: float) -> Times:
        """``weight`` of ``other`` and the rest of this, round by round."""
        pairs = ((self.wall, other.wall), (self.cpu, other.cpu))
        return Times(*([(1 - weight) * a + weight * b for a, b in zip(*pair)] for pair in pairs))

    def plus(self, other: Times) -> Times:
        """One after the other."""
        pairs = ((self.wall, other.wall), (self.cpu, other.cpu))
        return Times(*([a + b for a, b in zip(*pair)] for pair in pairs))


@dataclass
class Step:
    """What the rounds of one kind of step gave.

    Attributes:
        times: of the step.
        peak: largest memory in bytes, ``None`` where nothing tells.
        calls, engaged: attention calls of the step, and those the method carried out.
        kept: sum of the executed shares of the engaged calls.
        declined: calls left dense, by reason.
    """

    times: Times = field(default_factory=Times)
    peak: int | None = None
    calls: int = 0
    engaged: int = 0
    kept: float = 0.0
    declined: dict[str, int] = field(default_factory=dict)

    def mixed(self, other: Step, weight: float) -> Step:
        """``weight`` of ``other`` and the rest of this; the larger peak."""
        peaks = [peak for peak in (self.peak, other.peak) if peak is not None]
        kept = (1 - weight) * self.kept + weight * other.kept
        times = self.times.mixed(other.times, weight)
        return Step(times, max(peaks, default=None), other.calls, other.engaged, kept, other.declined)


@dataclass
class Part:
    """What the rounds of one attention call gave.

    Attributes:
        plan: choosing what to read.
        run: everything else.
        share: what was computed, as a share of the map.
    """

    plan: Times = field(default_factory=Times)
    run: Times = field(default_factory=Times)
    share: float = 1.0


def dense_row(step: Step, call: Part, count: int) -> dict[str, Any]:
    """The dense step; its attention is ``count`` calls like the one that was timed."""
    return {
        "label": "dense",
        "seconds": spread(step.times.wall),
        "cpu_seconds": spread(step.times.cpu) if any(step.times.cpu) else None,
        "peak_bytes": step.peak,
        "attention_calls": count,
        "attention_ms": spread(_milli(call.run.wall)),
        "attention_share": _part(count, call.run.wall, step.times.wall),
        "attention_share_cpu": _part(count, call.run.cpu, step.times.cpu),
    }


def step_row(step: Step, dense: Step, attention_share: float) -> dict[str, Any]:
    """Times, ratios to the dense step of the same round, executed densities, and the ceiling of the speed-up.

    Args:
        step, dense: what was timed.
        attention_share: of the dense step, for the ceiling: Amdahl's, if skipped work cost nothing.
    """
    ratios, on_cpu = _ratios(step.times, dense.times)
    over_step = (step.kept + step.calls - step.engaged) / step.calls
    return {
        "seconds": spread(step.times.wall),
        "cpu_seconds": spread(step.times.cpu) if any(step.times.cpu) else None,
        "ratio": spread(ratios),
        "ratio_cpu": spread(on_cpu) if on_cpu else None,
        "speedup": 1.0 / _median(ratios),
        "speedup_cpu": 1.0 / _median(on_cpu) if on_cpu else None,
        "ceiling": 1.0 / (1.0 - attention_share * (1.0 - over_step)),
        "density": step.kept / step.engaged,
        "step_density": over_step,
        "calls": step.calls,
        "engaged": step.engaged,
        "declined": step.declined,
        "peak_bytes": step.peak,
    }


def attention_row(part: Part, dense: Part, sparse: bool) -> dict[str, Any]:
    """One attention call: its speed-up with choosing counted, the share of choosing, and the verdict on the target."""
    total = part.plan.plus(part.run)
    ratios, on_cpu = _ratios(total, dense.run)
    speedup = 1.0 / _median(ratios)
    speedup_cpu = 1.0 / _median(on_cpu) if on_cpu else None
    target = TARGET / part.share if sparse else None
    return {
        "ms": spread(_milli(total.wall)),
        "plan_ms": _median(_milli(part.plan.wall)),
        "plan_share": _median([plan / whole for plan, whole in zip(part.plan.wall, total.wall)]),
        "density": part.share,
        "speedup": speedup,
        "speedup_cpu": speedup_cpu,
        "efficiency": speedup * part.share,
        "target": target,
        "met": None if target is None else speedup >= target,
        "met_cpu": None if target is None or speedup_cpu is None else speedup_cpu >= target,
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": _median(values), "min": min(values), "max": max(values)}


def _ratios(mine: Times, theirs: Times) -> tuple[list[float], list[float]]:
    """Round by round, of the wall and of processor time; the latter empty where there is none."""
    wall = [a / b for a, b in zip(mine.wall, theirs.wall)]
    return wall, [a / b for a, b in zip(mine.cpu, theirs.cpu)] if all((*mine.cpu, *theirs.cpu)) else []


def _part(count: int, call: Sequence[float], step: Sequence[float]) -> float | None:
    whole = _median(step)
    return min(1.0, count * _median(call) / whole) if whole else None


def _median(values: Sequence[float]) -> float:
    return statistics.median(values)


def _milli(seconds: Sequence[float]) -> list[float]:
    return [1e3 * value for value in seconds]
