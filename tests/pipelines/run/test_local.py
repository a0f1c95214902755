"""Worker processes: killed, poisoned, refused, ended; no model is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from dit_attn.errors import DitAttnError, RunStopped
from dit_attn.pipelines.run import LocalEngine, Outcome, Recipe, Task

STUB = "tests._support.stub_workers:make"


@pytest.fixture
def engine() -> Iterator[LocalEngine]:
    engine = LocalEngine()
    yield engine
    engine.stop()


def run(engine: LocalEngine, tasks: list[tuple[str, str]], workers: int = 2) -> list[Outcome]:
    engine.start(Recipe(STUB), workers)
    return sorted(engine.run(Task(key, task) for key, task in enumerate(tasks)), key=lambda one: one.task.key)


def test_killed_poisoned_and_failing_tasks_do_not_take_the_others_along(engine: LocalEngine) -> None:
    said = [("say", "a"), ("die once", "b"), ("die", "c"), ("fail", "it is NaN"), ("raise", "odd"), ("say", "f")]
    found = run(engine, said)
    assert [one.result and one.result["value"] for one in found] == ["a", "b", None, None, None, "f"]
    assert [one.tries for one in found] == [1, 2, 3, 1, 3, 1]
    assert "was killed (SIGKILL; out of memory?) (tried 3 times)" in str(found[2].error)
    assert found[3].error == "it is NaN" and found[4].error == "ValueError: odd (tried 3 times)"


def test_processes_are_ended_without_half_files(engine: LocalEngine, tmp_path: Path) -> None:
    engine.start(Recipe(STUB), 2)
    outcomes = engine.run([Task(0, ("wait", str(tmp_path / "a"))), Task(1, ("say", "b")), Task(2, ("stop", "full"))])
    assert next(outcomes).result["value"] == "b"
    with pytest.raises(RunStopped, match="full"):
        list(outcomes)
    processes = list(engine._processes.values())
    engine.stop()
    assert all(process.returncode is not None for process in processes)
    assert not [path for path in tmp_path.iterdir() if "half" in path.read_text()]


def test_a_process_that_cannot_be_started_is_one_line(engine: LocalEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **options: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr("subprocess.Popen", full)
    with pytest.raises(DitAttnError, match=r"cannot start a worker process .*; give fewer --workers"):
        engine.start(Recipe(STUB), 1)


@pytest.mark.parametrize(("settings", "why"), [({"refuse": "no model"}, "no model"), ({"broken": 1}, "get ready")])
def test_workers_that_cannot_get_ready_are_one_line(engine: LocalEngine, settings: dict[str, str], why: str) -> None:
    engine.start(Recipe(STUB, settings), 1)
    with pytest.raises(DitAttnError, match=why):
        list(engine.run([Task(0, ("say", "a"))]))


def test_every_worker_has_its_gpu_and_its_share_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 6)
    engine = LocalEngine(["4", "7"])
    assert engine.places() == 2 and LocalEngine().places() == 1
    assert engine.name(2).endswith(", worker 3, GPU 4")
    try:
        found = run(engine, [("say", "a")], workers=2)
        assert found[0].result["threads"] == "3" and found[0].result["worker"] == found[0].worker
    finally:
        engine.stop()
