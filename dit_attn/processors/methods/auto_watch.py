"""Are sparse calls slower than dense ones on this machine? Watched call by call while a run is made."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Any

from dit_attn.processors.core.layer import LayerStats

DENSE_CALLS = 2
"""Dense calls of a shape that are timed before the first sparse one."""
SPARSE_CALLS = 8
"""Sparse calls from one judgement to the next."""
CLEAR_CALLS, CLEAR = 3, 1.25
"""Sparse calls after which all of them may be clearly slower than every dense one, and by how much."""


@dataclass
class ShapeTimes:
    """Seconds of the calls of one shape.

    Attributes:
        dense, sparse: of each call, planning included.
        since: step of the first sparse call.
        waited: calls that were left dense in order to be timed.
        ratio: time of a sparse call over that of a dense one, where it was found to be above 1; stays so.
    """

    dense: list[float] = field(default_factory=list)
    sparse: list[float] = field(default_factory=list)
    since: int | None = None
    waited: int = 0
    ratio: float | None = None
    _judged: int = 0

    def wait(self) -> bool:
        """Return whether a call is to be left dense, so that there is something to compare with."""
        wanted = len(self.dense) < DENSE_CALLS and self.waited <= DENSE_CALLS  # other methods may leave it untimed
        self.waited += wanted
        return wanted

    def is_slow(self, step: int, period: int) -> bool:
        """Return whether sparse calls were found slower than dense ones.

        Medians are compared, and after the first few calls the fastest sparse one with the slowest dense one. Of a
        method whose calls differ within a period, means over one period or more.

        Args:
            step: of the run, from 0.
            period: steps after which the costs of a method's calls repeat.
        """
        if self.ratio is not None or len(self.dense) < DENSE_CALLS:
            return self.ratio is not None
        fresh = len(self.sparse) - self._judged >= SPARSE_CALLS
        first = period <= 1 and len(self.sparse) == CLEAR_CALLS
        if first and min(self.sparse) > CLEAR * max(self.dense):
            self.ratio = statistics.median(self.sparse) / statistics.median(self.dense)
        elif fresh and (period <= 1 or step - (self.since or 0) > period):
            self._judged = len(self.sparse)
            middle = statistics.fmean if period > 1 else statistics.median
            ratio = middle(self.sparse) / middle(self.dense)
            self.ratio = ratio if ratio > 1.0 else None
        return self.ratio is not None


@dataclass
class Watch:
    """The times of all shapes of a run; a call's time is read from its layer when the next call comes."""

    shapes: dict[Any, ShapeTimes] = field(default_factory=dict)
    _pending: tuple[ShapeTimes, LayerStats, tuple[float, ...], int] | None = None

    def begin(self, shape: Any, stats: LayerStats, step: int) -> ShapeTimes:
        """Note that a call begins, and return the times of the calls of its shape before it.

        Args:
            shape: names the shape.
            stats: of the layer.
            step: of the run.
        """
        self._settle()
        times = self.shapes.setdefault(shape, ShapeTimes())
        self._pending = (times, stats, _read(stats), step)
        return times

    def _settle(self) -> None:
        if self._pending is None:
            return
        times, stats, before, step = self._pending
        sparse, seconds, dense, dense_seconds = (now - then for now, then in zip(_read(stats), before))
        if sparse == 1:
            times.sparse.append(seconds)
            times.since = step if times.since is None else times.since
        elif dense == 1:
            times.dense.append(dense_seconds)


def _read(stats: LayerStats) -> tuple[float, ...]:
    return stats.sparse_calls, stats.seconds, stats.dense_calls, stats.dense_seconds
