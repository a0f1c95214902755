"""One of several parts of a run that know nothing of each other, as an array of a job service starts them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from dit_attn.errors import DitAttnError, shorten

T = TypeVar("T")
_TEXT = re.compile(r"(\d{1,6})/(\d{1,6})")


@dataclass(frozen=True)
class Shard:
    """Part ``number`` of ``count``, from 1; item i belongs to part ``i % count + 1``."""

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Return the shard that ``i/n`` says.

        Raises:
            DitAttnError: it is no such text, or i is not between 1 and n.
        """
        found = _TEXT.fullmatch(text.strip())
        if found is None:
            raise DitAttnError(f"--shard {shorten(text)} must be i/n, e.g. 1/4 for the first of four parts")
        number, count = int(found[1]), int(found[2])
        if not 1 <= number <= count:
            raise DitAttnError(f"--shard {text}: parts are numbered from 1 to n; the first of {count} is 1/{count}")
        return cls(number, count)

    def part(self, items: Sequence[T]) -> list[T]:
        """Return the items of this part."""
        return list(items[self.number - 1 :: self.count])

    def file(self, name: str) -> str:
        """Return the name of this part's own file: ``run.json`` is ``run-1-of-4.json``."""
        stem, _, ending = name.rpartition(".")
        return f"{stem}-{self.number}-of-{self.count}.{ending}"

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"
