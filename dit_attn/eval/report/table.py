"""Tables of a page as data; ``parts.html`` draws them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Cell:
    """One cell.

    Attributes:
        text: what it says.
        note: smaller, below a value or after a heading.
        hint: shown on hover, e.g. why there is no value.
        dot: CSS color of a dot in front.
    """

    text: str
    note: str = ""
    hint: str = ""
    dot: str = ""


Row = Sequence[Cell | str | int]


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        label: what a screen reader calls it.
        head: headings of the columns.
        rows: rows of cells; the first cell of a row is its heading.
    """

    label: str
    head: Sequence[Cell | str]
    rows: Sequence[Row]

    def title(self, column: int) -> str:
        """Return the heading of a column as text."""
        head = self.head[column]
        return head if isinstance(head, str) else head.text
