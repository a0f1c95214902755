"""Hand out tasks to a set of workers: pulled, retried on another worker, parked when they keep failing.

How workers are started and reached is left to the engines that derive from :class:`WorkerPool`.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from dit_attn.errors import DitAttnError, RunStopped
from dit_attn.pipelines.run.engine import Outcome, Recipe, Task

TRIES = 3  # of a task, before it is parked
STARTS = 3  # of a worker that dies without a task, one after the other, before it is given up


@dataclass(frozen=True)
class Event:
    """What a worker says, or what is said of it.

    Attributes:
        worker: its number, from 0.
        kind: ``"ready"``, ``"refused"`` (it cannot get ready and says why), ``"done"``, ``"failed"``, ``"stopped"``
            (no other task can be done either) or ``"dead"``.
        value: the result, or one line.
        final: another try of a failed task is of no use.
    """

    worker: int
    kind: str
    value: Any = None
    final: bool = False


@dataclass
class _Attempt:
    """A task that is being tried.

    Attributes:
        task: the task.
        tries: how often it was handed out.
        avoid: worker that failed it and is still there.
    """

    task: Task
    tries: int = 0
    avoid: int | None = None


class WorkerPool(ABC):
    """The part of an engine that decides; derived classes start, reach and end the workers."""

    def start(self, recipe: Recipe, workers: int) -> None:
        """Start so many workers, see :meth:`Engine.start`."""
        self._recipe = recipe
        self._idle: deque[int] = deque()
        self._busy: dict[int, _Attempt] = {}
        self._again: deque[_Attempt] = deque()
        self._alive = set(range(workers))
        self._resting: set[int] = set()
        self._early_deaths = dict.fromkeys(range(workers), 0)
        self._exhausted = False
        for worker in range(workers):
            self._spawn(worker)

    def run(self, tasks: Iterable[Task]) -> Iterator[Outcome]:
        """Yield what became of each task, see :meth:`Engine.run`."""
        source = iter(tasks)
        self._exhausted = False
        for worker in sorted(self._resting):
            self._resting.remove(worker)
            self._spawn(worker)
        while True:
            self._hand_out(source)
            if self._exhausted and not self._busy and not self._again:
                return
            outcome = self._handle(self._receive())
            if outcome is not None:
                yield outcome

    def name(self, worker: int) -> str:
        """Return the name of a worker, for messages and sidecars."""
        return f"worker {worker + 1}"

    @abstractmethod
    def _spawn(self, worker: int) -> None:
        """Start a worker, or start it again."""

    @abstractmethod
    def _send(self, worker: int, content: Any, again: bool) -> None:
        """Hand a task to a worker that is ready; ``again``: another worker has tried it before."""

    @abstractmethod
    def _receive(self) -> Event:
        """Wait for the next event."""

    def _hand_out(self, source: Iterator[Task]) -> None:
        for _ in range(len(self._idle)):
            worker = self._idle.popleft()
            attempt = self._next(worker, source)
            if attempt is None:
                self._idle.append(worker)
                if self._exhausted and not self._again:
                    return
                continue
            attempt.tries += 1
            self._busy[worker] = attempt
            self._send(worker, attempt.task.content, attempt.tries > 1)

    def _next(self, worker: int, source: Iterator[Task]) -> _Attempt | None:
        """Return what a worker does next: new tasks first, then those that failed on another one.

        With no other worker that is ready it retries its own failures.
        """
        if not self._exhausted:
            task = next(source, None)
            if task is not None:
                return _Attempt(task)
            self._exhausted = True
        for attempt in self._again:
            if attempt.avoid != worker or not (self._busy or self._idle):
                self._again.remove(attempt)
                return attempt
        return None

    def _handle(self, event: Event) -> Outcome | None:
        worker = event.worker
        if event.kind == "ready":
            self._early_deaths[worker] = 0
            self._idle.append(worker)
        elif event.kind == "done":
            attempt = self._busy.pop(worker)
            self._idle.append(worker)
            return Outcome(attempt.task, event.value, worker=self.name(worker), tries=attempt.tries)
        elif event.kind == "failed":
            self._idle.append(worker)
            return self._failed(worker, event.value, event.final, avoid=worker)
        elif event.kind == "stopped":
            raise RunStopped(event.value)
        elif event.kind == "refused":
            self._give_up(worker, event.value)
        else:
            return self._died(worker, event.value)
        return None

    def _failed(self, worker: int, why: str, final: bool, avoid: int | None) -> Outcome | None:
        attempt = self._busy.pop(worker)
        attempt.avoid = avoid
        if not final and attempt.tries < TRIES:
            self._again.append(attempt)
            return None
        error = f"{why} (tried {attempt.tries} times)" if attempt.tries > 1 else why
        return Outcome(attempt.task, error=error, worker=self.name(worker), tries=attempt.tries)

    def _died(self, worker: int, why: str) -> Outcome | None:
        outcome = None
        if worker in self._busy:
            outcome = self._failed(worker, why, False, avoid=None)
        else:
            self._early_deaths[worker] += 1
            self._idle = deque(one for one in self._idle if one != worker)
            if self._early_deaths[worker] == STARTS:
                self._give_up(worker, why)
                return None
        if self._again or not self._exhausted:
            self._spawn(worker)
        else:  # nothing is left to do; a later run starts it again
            self._resting.add(worker)
        return outcome

    def _give_up(self, worker: int, why: str) -> None:
        self._alive.discard(worker)
        if self._alive <= self._resting:
            raise DitAttnError(why)
        print(f"dit-attn: warning: {self.name(worker)} is left out: {why}", file=sys.stderr)
