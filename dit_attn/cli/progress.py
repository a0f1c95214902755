"""Progress bars: on terminals only, nothing on pipes, in files and in CI."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def on_terminal() -> bool:
    """Whether somebody watches standard error."""
    return sys.stderr.isatty()


def progress_bar(total: int, desc: str, unit: str = "item", shown: bool = True, least: int = 2) -> Any:
    """A bar on standard error, as a context manager with ``update()``.

    Args:
        total: number of units.
        desc: what is being done.
        unit: what is counted.
        shown: ``False`` for commands that print JSON alone.
        least: shorter work gets no bar.
    """
    from tqdm import tqdm

    return tqdm(total=total, desc=desc, unit=unit, disable=not (shown and on_terminal()) or total < least)


@contextmanager
def loading_libraries(shown: bool = True) -> Iterator[None]:
    """Say on a terminal that torch and diffusers are being imported, which takes seconds, where they are not yet.

    Args:
        shown: ``False`` for commands that print JSON alone.
    """
    line = StatusLine(shown and "diffusers" not in sys.modules)
    line("loading torch and diffusers ...")
    try:
        yield
    finally:
        line("")


class StatusLine:
    """One line on standard error that is written over.

    Args:
        shown: ``False`` for commands that print JSON alone.
    """

    def __init__(self, shown: bool = True) -> None:
        self._shown = shown and on_terminal()

    def __call__(self, text: str) -> None:
        """Show ``text`` in place of what was there; an empty text clears the line."""
        if self._shown:
            print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
