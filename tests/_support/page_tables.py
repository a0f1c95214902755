"""A table of a page that is made from records and stands between two marks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class PageTable(ABC):
    """One table of a page.

    Attributes:
        page: file of the page under docs/.
        name: in the marks around the table.
    """

    page: str
    name: str

    @property
    def marks(self) -> tuple[str, str]:
        """What stands before and after the table."""
        return f"<!-- {self.name}: begin -->", f"<!-- {self.name}: end -->"

    @abstractmethod
    def text(self) -> str:
        """Return the table in Markdown."""

    def current(self) -> str:
        """Return the table that the page shows now."""
        text = (ROOT / "docs" / self.page).read_text()
        begin, end = self.marks
        return text[text.index(begin) + len(begin) : text.index(end)].strip()

    def write(self) -> None:
        """Put the table into the page."""
        path, (begin, end) = ROOT / "docs" / self.page, self.marks
        text = path.read_text()
        start, stop = text.index(begin) + len(begin), text.index(end)
        path.write_text(f"{text[:start]}\n{self.text()}\n{text[stop:]}")


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return rows under a head as a table in Markdown."""
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows))
