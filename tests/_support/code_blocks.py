"""Find the fenced code blocks of a Markdown page."""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path
from types import CodeType

_FENCE = re.compile(
    r"^( *)(?:<!-- ([^\n]*?) -->\n\1)?```([\w-]+)([^\n`]*)\n(.*?)^\1```",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class CodeBlock:
    """One fenced block of a page.

    Attributes:
        page: the file.
        line: line number of its first line of code, from 1.
        language: the word after the fence, e.g. ``python``.
        title: the rest of the fence's line, e.g. ``title="first_frame.py"``.
        note: the HTML comment on the line before the fence, e.g. ``not run: needs a download``; empty without one.
        text: the code, without the fence's indentation.
    """

    page: Path
    line: int
    language: str
    title: str
    note: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"

    def compiled(self) -> CodeType:
        """Compile Python code so that a traceback shows the page and the page's line numbers."""
        return compile("\n" * (self.line - 1) + self.text, str(self.page), "exec")


def code_blocks(page: Path, language: str | None = None) -> list[CodeBlock]:
    """List the fenced blocks of a page in their order.

    Args:
        page: a Markdown file.
        language: only blocks of this language; ``None`` lists all.
    """
    source = page.read_text(encoding="utf-8")
    found = [
        CodeBlock(
            page=page,
            line=source.count("\n", 0, match.start(5)) + 1,
            language=match.group(3),
            title=match.group(4).strip(),
            note=match.group(2) or "",
            text=textwrap.dedent(match.group(5)),
        )
        for match in _FENCE.finditer(source)
    ]
    return [block for block in found if language in (None, block.language)]
