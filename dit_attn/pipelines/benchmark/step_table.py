"""Turn the timed rounds of a model benchmark into table rows: medians, ratios within rounds, ceilings, targets."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

TARGET = 0.6  # the speed-up of attention should be at least this fraction of 1 / density


@dataclass
class Times:
    """Times in seconds, one entry per round.

    Attributes:
        wall: wall-clock time.
        cpu: processor time of the process's threads, 0 where an accelerator does the work. On a busy machine its
            ratios are more reliable than those of the wall clock. Figures of it are ``None`` where it is 0.
    """

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def add(self, seconds: tuple[float, float]) -> None:
        """Append the wall-clock and processor time of a round."""
        self.wall.append(seconds[0])
        self.cpu.append(seconds[1])

    def mixed(self, other: Times, weight: float) -> Times:
        """Return ``(1 - weight) * self + weight * other``, round by round."""
        pairs = ((self.wall, other.wall), (self.cpu, other.cpu))
        return Times(*([(1 - weight) * a + weight * b for a, b in zip(*pair)] for pair in pairs))

    def plus(self, other: Times) -> Times:
        """Return the sum, round by round."""
        pairs = ((self.wall, other.wall), (self.cpu, other.cpu))
        return Times(*([a + b for a, b in zip(*pair)] for pair in pairs))


@dataclass
class StepTimes:
    """Measurements of one kind of denoising step.

    Attributes:
        times: of the step.
        peak: peak memory in bytes, ``None`` where it cannot be measured.
        calls, sparse_calls: attention calls of the step, and those that the method computed.
        computed: sum over the sparse calls of the attention computed, as a fraction of dense.
        fallbacks: number of calls left to stock attention, by reason.
    """

    times: Times = field(default_factory=Times)
    peak: int | None = None
    calls: int = 0
    sparse_calls: int = 0
    computed: float = 0.0
    fallbacks: dict[str, int] = field(default_factory=dict)

    def mixed(self, other: StepTimes, weight: float) -> StepTimes:
        """Return ``(1 - weight) * self + weight * other``; of the peaks the larger one."""
        peaks = [peak for peak in (self.peak, other.peak) if peak is not None]
        computed = (1 - weight) * self.computed + weight * other.computed
        times = self.times.mixed(other.times, weight)
        return StepTimes(times, max(peaks, default=None), other.calls, other.sparse_calls, computed, other.fallbacks)


@dataclass
class AttentionTimes:
    """Measurements of one attention call.

    Attributes:
        plan: times of selecting the key blocks.
        run: times of everything else.
        density: attention computed, as a fraction of dense.
    """

    plan: Times = field(default_factory=Times)
    run: Times = field(default_factory=Times)
    density: float = 1.0


def dense_row(step: StepTimes, call: AttentionTimes, count: int) -> dict[str, Any]:
    """Return the row of the dense step.

    Args:
        step: the dense step.
        call: one of its attention calls.
        count: number of such calls in the step.
    """
    return {
        "label": "dense",
        "seconds": spread(step.times.wall),
        "cpu_seconds": spread(step.times.cpu) if any(step.times.cpu) else None,
        "peak_bytes": step.peak,
        "attention_calls": count,
        "attention_ms": spread(_milliseconds(call.run.wall)),
        "attention_share": _fraction_of_step(count, call.run.wall, step.times.wall),
        "attention_share_cpu": _fraction_of_step(count, call.run.cpu, step.times.cpu),
    }


def step_row(step: StepTimes, dense: StepTimes, attention_share: float) -> dict[str, Any]:
    """Return times, ratios to the dense step of the same round, densities, and the ceiling of the speed-up.

    Args:
        step: a step of a method.
        dense: the dense step.
        attention_share: fraction of the dense step spent in attention. The ceiling is Amdahl's: the speed-up if skipped
            attention cost nothing.
    """
    ratios, on_cpu = _ratios(step.times, dense.times)
    over_step = (step.computed + step.calls - step.sparse_calls) / step.calls
    return {
        "seconds": spread(step.times.wall),
        "cpu_seconds": spread(step.times.cpu) if any(step.times.cpu) else None,
        "ratio": spread(ratios),
        "ratio_cpu": spread(on_cpu) if on_cpu else None,
        "speedup": 1.0 / _median(ratios),
        "speedup_cpu": 1.0 / _median(on_cpu) if on_cpu else None,
        "ceiling": 1.0 / (1.0 - attention_share * (1.0 - over_step)),
        "density": step.computed / step.sparse_calls,
        "step_density": over_step,
        "calls": step.calls,
        "sparse_calls": step.sparse_calls,
        "fallbacks": step.fallbacks,
        "peak_bytes": step.peak,
    }


def attention_row(call: AttentionTimes, dense: AttentionTimes, sparse: bool) -> dict[str, Any]:
    """Return the speed-up of one attention call with selection included, and whether it meets :data:`TARGET`.

    Args:
        call: by a method.
        dense: the same call by dense attention.
        sparse: whether the call is of a sparse step; others have no target.
    """
    total = call.plan.plus(call.run)
    ratios, on_cpu = _ratios(total, dense.run)
    speedup = 1.0 / _median(ratios)
    speedup_cpu = 1.0 / _median(on_cpu) if on_cpu else None
    target = TARGET / call.density if sparse else None
    return {
        "ms": spread(_milliseconds(total.wall)),
        "plan_ms": _median(_milliseconds(call.plan.wall)),
        "plan_share": _median([plan / both for plan, both in zip(call.plan.wall, total.wall)]),
        "density": call.density,
        "speedup": speedup,
        "speedup_cpu": speedup_cpu,
        "efficiency": speedup * call.density,
        "target": target,
        "met": None if target is None else speedup >= target,
        "met_cpu": None if target is None or speedup_cpu is None else speedup_cpu >= target,
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return ``median``, ``min`` and ``max``."""
    return {"median": _median(values), "min": min(values), "max": max(values)}


def _ratios(ours: Times, theirs: Times) -> tuple[list[float], list[float]]:
    """Ratios of the wall-clock and of the processor times, round by round; the latter empty where there are none."""
    wall = [a / b for a, b in zip(ours.wall, theirs.wall)]
    return wall, [a / b for a, b in zip(ours.cpu, theirs.cpu)] if all((*ours.cpu, *theirs.cpu)) else []


def _fraction_of_step(count: int, call: Sequence[float], step: Sequence[float]) -> float | None:
    total = _median(step)
    return min(1.0, count * _median(call) / total) if total else None


def _median(values: Sequence[float]) -> float:
    return statistics.median(values)


def _milliseconds(seconds: Sequence[float]) -> list[float]:
    return [1e3 * value for value in seconds]
