"""Workers without models: a function for the local and Ray engines, and a pool whose workers are in this process."""

from __future__ import annotations

import os
import signal
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dit_attn import files
from dit_attn.errors import DitAttnError, RunStopped
from dit_attn.pipelines.run import JobFailed
from dit_attn.pipelines.run.pool import Event, WorkerPool


def make(settings: dict[str, Any], name: str) -> Callable[[Any, bool], Any]:
    """Return a worker that does what its tasks say: (verb, value)."""
    if "refuse" in settings:
        raise DitAttnError(settings["refuse"])
    if "broken" in settings:
        raise KeyError("weights")

    def work(content: Any, again: bool) -> Any:
        verb, value = content
        if verb == "die" or (verb == "die once" and not again):
            os.kill(os.getpid(), signal.SIGKILL)
        if verb == "fail":
            raise JobFailed(value, final=True)
        if verb == "raise":
            raise ValueError(value)
        if verb == "stop":
            raise RunStopped(value)
        if verb == "wait":  # until it is ended, with a half file
            with files.atomic_path(Path(value)) as temporary:
                temporary.write_text("half")
                print("library output is no answer", flush=True)
                signal.pause()
        return {"value": value, "worker": name, "pid": os.getpid(), "threads": os.environ.get("OMP_NUM_THREADS")}

    return work


def make_dying(settings: dict[str, Any], name: str) -> Callable[[Any, bool], Any]:
    """Return a worker of ``generate`` that is killed while it makes the first item for the first time."""
    from dit_attn.cli import item_worker, runner

    work = item_worker.make_worker(settings, name)
    call = runner.call_pipeline

    def dying(content: Any, again: bool) -> Any:
        def die(pipe: Any, job: Any) -> Any:
            call(pipe, job)
            os.kill(os.getpid(), signal.SIGKILL)

        runner.call_pipeline = die if content["index"] == 0 and not again else call
        return work(content, again)

    return dying


class StubPool(WorkerPool):
    """Workers that answer at once; ``answer(worker, content)`` says what."""

    def __init__(self, answer: Callable[[int, Any], Event]) -> None:
        self._answer = answer
        self._events: deque[Event] = deque()
        self.spawned: list[int] = []

    def _spawn(self, worker: int) -> None:
        self.spawned.append(worker)
        self._events.append(Event(worker, "ready"))

    def _send(self, worker: int, content: Any, again: bool) -> None:
        self._events.append(self._answer(worker, content))

    def _receive(self) -> Event:
        return self._events.popleft()
