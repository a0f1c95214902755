"""The part of the work that one of several processes does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass
class WorkerShare:
    """The part of the work that one of several processes does.

    Attributes:
        rank, size: number of this process, from 0, and of how many.
        gather: joins the lists of all processes and returns the result to each of them.
    """

    rank: int = 0
    size: int = 1
    gather: Callable[[list[Any]], list[Any]] = lambda items: items

    def part(self, items: Sequence[T]) -> list[T]:
        """Return the items that this process does: every ``size``-th one."""
        return list(items[self.rank :: self.size])
