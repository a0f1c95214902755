"""Who gets which task: pulled, retried on another worker, parked; by workers that answer at once."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_attn.errors import DitAttnError, RunStopped
from dit_attn.pipelines.run import JobFailed, Recipe, Task, answered_by, answered_here
from dit_attn.pipelines.run.pool import STARTS, TRIES, Event
from tests._support.driver_simulation import simulate
from tests._support.stub_workers import StubPool

RECIPE = Recipe("nowhere:make")


def run(answer: Any, count: int, workers: int = 3) -> tuple[StubPool, list[Any]]:
    pool = StubPool(answer)
    pool.start(RECIPE, workers)
    return pool, list(pool.run(Task(key, key) for key in range(count)))


def test_every_task_is_done_once_and_tasks_are_pulled_as_workers_get_free() -> None:
    pulled: list[int] = []

    def tasks() -> Iterator[Task]:
        for key in range(10):
            pulled.append(key)
            yield Task(key, key)

    pool = StubPool(lambda worker, content: Event(worker, "done", content * 2))
    pool.start(RECIPE, 3)
    outcomes = pool.run(tasks())
    first = next(outcomes)
    assert first.result == 0 and len(pulled) <= 3  # not split in advance
    assert sorted(one.result for one in [first, *outcomes]) == list(range(0, 20, 2))


def test_a_task_that_fails_goes_to_another_worker_after_the_new_ones() -> None:
    seen: list[tuple[int, int]] = []

    def answer(worker: int, content: int) -> Event:
        seen.append((worker, content))
        bad = content == 1 and sum(key == 1 for _, key in seen) == 1
        return Event(worker, "failed", "no") if bad else Event(worker, "done")

    _, outcomes = run(answer, 6)
    assert {one.task.key: one.tries for one in outcomes} == {0: 1, 1: 2, 2: 1, 3: 1, 4: 1, 5: 1}
    assert seen[-1][1] == 1 and len({worker for worker, key in seen if key == 1}) == 2


@pytest.mark.parametrize("kind", ["failed", "dead"])
def test_a_task_that_keeps_failing_is_parked_and_the_rest_goes_on(kind: str) -> None:
    pool, outcomes = run(lambda w, key: Event(w, kind, "it broke") if key == 2 else Event(w, "done"), 5)
    parked = [one for one in outcomes if one.error is not None]
    assert [(one.task.key, one.error, one.tries) for one in parked] == [(2, f"it broke (tried {TRIES} times)", TRIES)]
    assert len(outcomes) == 5
    assert len(pool.spawned) == 3 + (TRIES - 1 if kind == "dead" else 0)  # not started again when nothing is left


def test_a_failure_that_says_all_there_is_is_parked_at_once() -> None:
    _, outcomes = run(lambda w, key: Event(w, "failed", "NaN", final=True), 2)
    assert [(one.error, one.tries) for one in outcomes] == [("NaN", 1)] * 2


def test_one_worker_alone_retries_its_own_failures() -> None:
    tries: Counter[int] = Counter()

    def answer(worker: int, key: int) -> Event:
        tries[key] += 1
        return Event(worker, "failed", "no") if tries[key] == 1 else Event(worker, "done")

    assert [one.tries for one in run(answer, 2, workers=1)[1]] == [2, 2]


def test_a_worker_that_is_never_ready_keeps_no_failure_waiting() -> None:
    class Queued(StubPool):
        def _spawn(self, worker: int) -> None:
            if worker == 0:  # the others wait for a free place of their cluster
                super()._spawn(worker)

    pool = Queued(lambda worker, key: Event(worker, "failed", "no"))
    pool.start(RECIPE, 3)
    assert [one.tries for one in pool.run([Task(0, 0)])] == [TRIES]


def test_a_pool_may_be_run_again_and_a_worker_that_died_at_the_end_is_started_again() -> None:
    deaths = iter([True] * TRIES)
    pool = StubPool(lambda w, key: Event(w, "dead", "it broke") if next(deaths, False) else Event(w, "done", key))
    pool.start(RECIPE, 1)
    assert [one.error for one in pool.run([Task(0, 0)])] == [f"it broke (tried {TRIES} times)"]
    assert [one.result for one in pool.run([Task(0, 5), Task(1, 6)])] == [5, 6]
    assert [one.result for one in pool.run([Task(0, 7)])] == [7] and len(pool.spawned) == 1 + TRIES


def test_requests_are_answered_by_workers_and_those_that_are_parked_are_an_error_at_the_end() -> None:
    pool = StubPool(lambda w, key: Event(w, "failed", "NaN", final=True) if key % 2 else Event(w, "done", -key))
    pool.start(RECIPE, 2)
    assert dict(answered_by(pool, [0, 2, 4])) == {0: 0, 1: -2, 2: -4} == dict(answered_here(lambda x: -x)([0, 2, 4]))
    with pytest.raises(JobFailed, match=r"^NaN \(and 1 others\)$"):
        list(answered_by(pool, [1, 2, 3, 4]))
    found = answered_by(pool, [1, 2, 3, 4])
    assert {next(found), next(found)} == {(1, -2), (3, -4)}


def test_a_full_disk_stops_everything() -> None:
    with pytest.raises(RunStopped, match="disk is full"):
        run(lambda w, key: Event(w, "stopped", "disk is full"), 3)


class Refusing(StubPool):
    """Worker 0 never gets ready."""

    kind = "refused"

    def _spawn(self, worker: int) -> None:
        self.spawned.append(worker)
        self._events.append(Event(worker, self.kind, "no weights") if worker == 0 else Event(worker, "ready"))


@pytest.mark.parametrize(("kind", "starts"), [("refused", 1), ("dead", STARTS)])
def test_a_worker_that_never_gets_ready_is_left_out_and_the_last_one_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str, starts: int
) -> None:
    monkeypatch.setattr(Refusing, "kind", kind)
    pool = Refusing(lambda worker, key: Event(worker, "done"))
    pool.start(RECIPE, 2)
    assert len(list(pool.run(Task(key, key) for key in range(8)))) == 8
    assert pool.spawned.count(0) == starts
    assert capsys.readouterr().err == "dit-attn: warning: worker 1 is left out: no weights\n"
    alone = Refusing(lambda worker, key: Event(worker, "done"))
    alone.start(RECIPE, 1)
    with pytest.raises(DitAttnError, match="no weights"):
        list(alone.run([Task(0, 0)]))


@settings(deadline=None)
@given(st.lists(st.sampled_from(["done", "failed", "dead"]), max_size=40), st.integers(1, 5), st.integers(0, 12))
def test_whatever_happens_every_task_has_one_outcome(script: list[str], workers: int, count: int) -> None:
    plan = iter(script)
    _, outcomes = run(lambda w, key: Event(w, next(plan, "done"), "why"), count, workers)
    assert sorted(one.task.key for one in outcomes) == list(range(count))
    assert all(one.tries <= TRIES for one in outcomes)


def test_the_driver_holds_no_more_after_many_jobs() -> None:
    tracemalloc.start()
    try:
        found = simulate(100, 6000, marks=6)
    finally:
        tracemalloc.stop()
    assert found["jobs"] == 6000
    assert found["bytes_held"][4] < 1.1 * found["bytes_held"][1]  # tables grow at first; at the end all are idle
