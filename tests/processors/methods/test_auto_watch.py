"""When sparse calls count as slower than dense ones, and how the benchmark of ``auto`` judges."""

from __future__ import annotations

from dit_attn.processors.core.layer import LayerStats
from dit_attn.processors.methods.auto_watch import CLEAR_CALLS, DENSE_CALLS, SPARSE_CALLS, ShapeTimes, Watch
from tests._support.auto_benchmark import judge


def times(dense: float, sparse: list[float], since: int = 0) -> ShapeTimes:
    return ShapeTimes([dense] * DENSE_CALLS, sparse, since)


def test_medians_decide_after_enough_calls_and_a_verdict_stays() -> None:
    assert not times(1.0, [9.0] * (SPARSE_CALLS - 1)).is_slow(0, 1)
    assert not ShapeTimes([1.0], [9.0] * SPARSE_CALLS, 0).is_slow(0, 1)  # nothing to compare with
    assert not times(1.0, [1.0] * SPARSE_CALLS).is_slow(0, 1)
    assert not times(1.0, [0.5] * (SPARSE_CALLS - 3) + [99.0] * 3).is_slow(0, 1)  # a few hiccups
    found = times(1.0, [1.5] * SPARSE_CALLS)
    assert found.is_slow(0, 1) and found.ratio == 1.5
    found.sparse += [0.1] * 100
    assert found.is_slow(9, 1)


def test_calls_that_are_all_clearly_slower_end_early() -> None:
    found = times(1.0, [1.3, 9.0, 1.4])
    assert found.is_slow(0, 1) and found.ratio == 1.4
    assert not times(1.0, [1.2, 9.0, 9.0]).is_slow(0, 1)
    assert not times(1.0, [9.0] * CLEAR_CALLS).is_slow(0, 5)  # a refresh comes first
    assert not ShapeTimes([1.0], [9.0] * CLEAR_CALLS, 0).is_slow(0, 1)


def test_a_period_is_judged_as_a_whole() -> None:
    calls = [2.0, *[0.1] * 4] * 2
    assert not times(1.0, calls).is_slow(4, 5) and not times(1.0, calls).is_slow(6, 5)
    assert times(0.4, calls).is_slow(6, 5) and not times(0.4, calls).is_slow(5, 5)  # mean 0.48


def test_a_call_is_timed_when_the_next_one_begins_whatever_its_layer_and_shape() -> None:
    watch, first, second = Watch(), LayerStats(), LayerStats()
    small = watch.begin("small", first, 0)
    first.dense_calls, first.dense_seconds = 1, 3.0
    large = watch.begin("large", second, 2)
    second.sparse_calls, second.seconds = 1, 5.0
    assert watch.begin("small", first, 3) is small
    watch.begin("small", second, 3)  # the call before it was not timed
    assert (small.dense, small.sparse, large.dense, large.sparse, large.since) == ([3.0], [], [], [5.0], 2)


def test_waiting_for_dense_calls_ends_where_none_is_timed() -> None:
    found = ShapeTimes()
    assert [found.wait() for _ in range(6)] == [True] * (DENSE_CALLS + 1) + [False] * (5 - DENSE_CALLS)
    assert not times(1.0, []).wait()


def test_the_benchmark_compares_with_dense_and_with_the_fastest_arm_that_is_as_close() -> None:
    seconds = {"dense": [2.0] * 5, "auto": [1.0] * 5, "close": [0.9] * 5, "coarse": [0.2] * 5}
    errors = {"dense": 0.0, "auto": 0.1, "close": 0.1, "coarse": 0.2}
    found = judge(seconds, errors)
    assert found["best"] == "close" and found["never_slower"] and not found["near_best"]
    assert found["against_dense"]["value"] == 0.5 and found["against_best"]["value"] == 1.1111
    assert judge({**seconds, "auto": [2.05] * 5}, errors)["never_slower"] is False
    assert judge({**seconds, "close": [0.96] * 5}, errors)["near_best"]
