"""What an engine is, and what passes between it and its workers: JSON values alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class Recipe:
    """How a worker gets ready.

    Attributes:
        maker: ``"module:function"``; called with ``settings`` and the worker's name, it returns a function from the
            content of a task to its result.
        settings: JSON values.
        folder: the current folder of the workers, where it exists; relative paths of the command lead from it.
    """

    maker: str
    settings: dict[str, Any] = field(default_factory=dict)
    folder: str = "."


@dataclass(frozen=True)
class Task:
    """One job, or several that must share a worker.

    Attributes:
        key: which it is, for the caller.
        content: what the worker's function is called with; JSON values.
    """

    key: int
    content: Any


@dataclass(frozen=True)
class Outcome:
    """What became of a task.

    Attributes:
        task: the task.
        result: what the worker's function returned; ``None`` when the task is parked.
        error: one line, why it is parked.
        worker: name of the worker that had it last.
        tries: how many workers had it.
    """

    task: Task
    result: Any = None
    error: str | None = None
    worker: str = ""
    tries: int = 1


class JobFailed(Exception):
    """Raised by a worker's function: one line, and whether another try is of no use."""

    def __init__(self, why: str, final: bool = False) -> None:
        super().__init__(why)
        self.final = final


class Engine(Protocol):
    """Runs tasks somewhere; :meth:`stop` must be called in the end, whatever happened."""

    def places(self) -> int:
        """Return how many workers there is room for: one per GPU, one without any.

        Raises:
            DitAttnError: it cannot be reached.
        """

    def start(self, recipe: Recipe, workers: int) -> None:
        """Start so many workers; they get ready while tasks wait.

        Raises:
            DitAttnError: none can be started.
        """

    def run(self, tasks: Iterable[Task]) -> Iterator[Outcome]:
        """Yield what became of each task, in the order in which they end; tasks are pulled as workers get free.

        It may be called again once all tasks have ended; workers keep what they have loaded.

        Raises:
            DitAttnError: no worker is left, with what the last one said.
            RunStopped: a worker met what would stop the others too (a full disk).
        """

    def stop(self) -> None:
        """End every worker. A file that one is writing does not appear."""
