"""Requests of a procedure, answered in this process or by workers: all that a procedure needs to know of an engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from dit_attn.pipelines.run.engine import Engine, JobFailed, Task

Answers = Callable[[Sequence[Any]], Iterator[tuple[int, Any]]]
"""``answers(requests)`` yields (position, answer) of every request, as they end; JSON values both."""


def answered_here(answer: Callable[[Any], Any]) -> Answers:
    """Return what answers requests in this process, in order, each when the one before has been taken."""

    def answers(requests: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        for position, request in enumerate(requests):
            yield position, answer(request)

    return answers


def answered_by(engine: Engine, requests: Sequence[Any]) -> Iterator[tuple[int, Any]]:
    """Yield the answers of workers, as they come.

    Args:
        engine: started.
        requests: JSON values.

    Raises:
        JobFailed: a request is parked; the others are answered first.
        DitAttnError: no worker is left.
    """
    parked: list[str] = []
    for outcome in engine.run(Task(position, request) for position, request in enumerate(requests)):
        if outcome.error is not None:
            parked.append(outcome.error)
        else:
            yield outcome.task.key, outcome.result
    if parked:
        more = f" (and {len(parked) - 1} others)" if len(parked) > 1 else ""
        raise JobFailed(f"{parked[0]}{more}")
