"""Tables on the terminal: aligned columns, plain text on pipes, nothing cut off."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TextIO

_KEY_WIDTH = 8  # of the first column of :func:`fields`, at least
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

    def text(self, width: int | None = None) -> str:
        """The table as text.

        Args:
            width: columns of the terminal; ``None``: as wide as it is, without colors. A table that is wider even with
                its text folded is not cut: the terminal wraps its lines.
        """
        from rich.cells import cell_len
        from rich.console import Console
        from rich.measure import Measurement
        from rich.table import Table as RichTable
        from rich.text import Text

        titles = [title.removeprefix(">") for title in self.columns]
        made = RichTable(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=any(titles), header_style="bold")
        for index, (column, title) in enumerate(zip(self.columns, titles)):
            foldable = title in self.folded
            widest = max(map(cell_len, [title, *(row[index] for row in self.rows if index < len(row))]))
            made.add_column(Text(title), no_wrap=not foldable, min_width=None if foldable else widest, overflow="fold")
            made.columns[-1].justify = "right" if column.startswith(">") else "left"
        for row in self.rows:
            made.add_row(*map(Text, row))
        out = io.StringIO()
        console = Console(file=out, force_terminal=width is not None, width=width or _UNLIMITED, legacy_windows=False)
        if width is not None:
            room = console.options.update(max_width=_UNLIMITED)
            console.width = max(width, Measurement.get(console, room, made).minimum)
        console.print(made)
        lines = [line.rstrip() for line in out.getvalue().splitlines()]
        return "\n".join([self.title] * bool(self.title) + lines)


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
