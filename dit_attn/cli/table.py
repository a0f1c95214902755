"""Tables on the terminal: aligned columns, plain text on pipes, nothing cut off."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TextIO

_KEY_WIDTH = 8  # of the first column of :func:`fields`, at least
_GAP = 2  # between columns
_NARROW = 12  # a folded column becomes no narrower
_UNLIMITED = 100_000  # columns: wide enough that nothing wraps


@dataclass(frozen=True)
class Table:
    """Rows under column titles.

    Attributes:
        columns: titles; one that begins with ``>`` is aligned right.
        rows: cells; a short row leaves the rest empty.
        title: line above it.
        folded: columns whose text may take several lines where the terminal is narrow; the others never wrap.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]] = field(default_factory=list)
    title: str = ""
    folded: Sequence[str] = ()

    def without_empty(self) -> Table:
        """Return the table without the columns that no row has anything in."""
        used = [i for i in range(len(self.columns)) if any(row[i] for row in self.rows if i < len(row))]
        rows = [[row[i] for i in used if i < len(row)] for row in self.rows]
        return replace(self, columns=[self.columns[i] for i in used], rows=rows)

    def text(self, width: int | None = None) -> str:
        """Return the table as text.

        Args:
            width: columns of the terminal; ``None``: as wide as it is, without colors. Where it does not fit, titles
                take several lines and folded columns become narrow; what is still wider is not cut, the terminal wraps
                it.
        """
        from rich.console import Console
        from rich.table import Table as RichTable
        from rich.text import Text

        titles = [title.removeprefix(">") for title in self.columns]
        widest = self._widest(titles)
        if width is not None and sum(widest) + _GAP * (len(widest) - 1) > width:
            titles = [re.sub(r" (?!%)", "\n", title) for title in titles]
            widest = self._widest(titles)
        made = RichTable(
            box=None, pad_edge=False, padding=(0, _GAP, 0, 0), show_header=any(titles), header_style="bold"
        )
        least = []
        for column, title, wide in zip(self.columns, titles, widest):
            foldable = column in self.folded
            least.append(min(wide, _NARROW) if foldable else wide)
            made.add_column(Text(title), no_wrap=not foldable, min_width=least[-1], overflow="fold")
            made.columns[-1].justify = "right" if column.startswith(">") else "left"
        for row in self.rows:
            made.add_row(*map(Text, row))
        out = io.StringIO()
        console = Console(file=out, force_terminal=width is not None, width=_UNLIMITED, legacy_windows=False)
        if width is not None:
            console.width = max(width, sum(least) + _GAP * len(least))
        console.print(made)
        lines = [line.rstrip() for line in out.getvalue().splitlines()]
        return "\n".join([self.title] * bool(self.title) + lines)

    def _widest(self, titles: Sequence[str]) -> list[int]:
        """Columns of the terminal that every column needs for its title and its cells."""
        from rich.cells import cell_len

        return [
            max(map(cell_len, [*title.split("\n"), *(row[index] for row in self.rows if index < len(row))]))
            for index, title in enumerate(titles)
        ]


def fields(rows: Mapping[str, object] | Iterable[tuple[str, object]]) -> Table:
    """Names and values, one pair per line; values are never wrapped, so that paths and commands can be copied."""
    pairs = rows.items() if isinstance(rows, Mapping) else rows
    return Table(("", ""), [(f"{name:<{_KEY_WIDTH}}", str(value)) for name, value in pairs])


def show(*parts: str | Table, file: TextIO | None = None) -> None:
    """Print texts and tables, tables fitted to the terminal when there is one."""
    stream = sys.stdout if file is None else file
    width = _width() if stream.isatty() else None
    print("\n".join(part if isinstance(part, str) else part.text(width) for part in parts), file=stream, flush=True)


def _width() -> int:
    import shutil

    return shutil.get_terminal_size().columns
