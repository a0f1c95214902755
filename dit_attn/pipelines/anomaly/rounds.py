"""Which pairs are made together: a round per attempt, in batches that depend on the quotas and on nothing else.

A pair's pixels depend on its batch in the last bit, as sums of other shapes are added up in another order. So a batch
is not filled up with whatever is open: the pairs that are due in a round are those whose earlier attempts were all
rejected, in the order of the quotas, and every ``batch`` of them are made at once, whatever the number of processes
and wherever an earlier run stopped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Pair = tuple[str, str, int]
"""Product, defect, number."""


class Rounds:
    """The attempts of a run so far.

    Args:
        counts: pairs wanted, by (product, defect).
        batch: pairs at once.
        retries: attempts after the first.
        rows: of the manifest.
    """

    def __init__(
        self, counts: Mapping[tuple[str, str], int], batch: int, retries: int, rows: Iterable[dict[str, Any]] = ()
    ):
        self.wanted: list[Pair] = [(p, d, i) for (p, d), count in counts.items() for i in range(count)]
        self.batch, self.retries = batch, retries
        self._rows: dict[tuple[Pair, int], dict[str, Any]] = {}
        self.add(rows)

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        """Note attempts by their rows."""
        for row in rows:
            self._rows[(row["product"], row["defect"], row["number"]), row["attempt"]] = row

    def has(self, pair: Pair, attempt: int) -> bool:
        """Return whether an attempt was made."""
        return (pair, attempt) in self._rows

    def open(self, attempt: int) -> list[Sequence[Pair]]:
        """Return the batches of a round in which an attempt is missing."""
        due = [pair for pair in self.wanted if self._rejections(pair) >= attempt]
        batches = [due[start : start + self.batch] for start in range(0, len(due), self.batch)]
        return [pairs for pairs in batches if any(not self.has(pair, attempt) for pair in pairs)]

    @property
    def finished(self) -> int:
        """Number of wanted pairs that are accepted or out of attempts."""
        return sum(
            self._rejections(pair) > self.retries or self.has(pair, self._rejections(pair)) for pair in self.wanted
        )

    @property
    def rejected(self) -> int:
        """Number of rejected attempts."""
        return sum(row["decision"] == "rejected" for row in self._rows.values())

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows by product, defect, number and attempt."""
        return [row for _, row in sorted(self._rows.items(), key=lambda item: item[0])]

    def _rejections(self, pair: Pair) -> int:
        """How many attempts were rejected before the first that was accepted or not made."""
        count = 0
        while self._rows.get((pair, count), {}).get("decision") == "rejected":
            count += 1
        return count
