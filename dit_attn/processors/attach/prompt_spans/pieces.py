"""Find pieces of a prompt, and mark their bounds so that they can be found in the text that is tokenized.

Pipelines clean prompts and put them into templates. The bounds are characters of the private use area, which none of
them touches; where the text without them is the text that the pipeline makes otherwise, they stand at the right place.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

from dit_attn.errors import DitAttnError, shorten

Piece = str | tuple[int, int]
"""A piece of a prompt: its text, for every occurrence, or (start, end) in characters, end excluded."""

_FIRST, _COUNT = 0xE000, 6400  # the private use area of the basic plane


def occurrences(prompt: str, piece: Piece) -> list[tuple[int, int]]:
    """Return (start, end) of a piece in a prompt, without white space at its edges; empty where it does not occur.

    A text counts where it stands as words of its own; where it never does, also inside of words.

    Raises:
        DitAttnError: a piece that is empty, out of range or neither a text nor a range.
    """
    if isinstance(piece, str):
        text = piece.strip()
        if not text:
            raise DitAttnError("a piece of a prompt must have a character that is not white space")
        starts = [at for at in range(len(prompt)) if prompt.startswith(text, at)]
        words = [at for at in starts if not (_joined(prompt, at) or _joined(prompt, at + len(text)))]
        return [(at, at + len(text)) for at in _disjoint(words or starts, len(text))]
    if not isinstance(piece, (tuple, list)) or len(piece) != 2 or not all(type(bound) is int for bound in piece):
        raise DitAttnError(f"a piece of a prompt is a text or (start, end) in characters, got {shorten(piece)}")
    start, end = piece
    if not 0 <= start < end <= len(prompt):
        raise DitAttnError(f"the piece ({start}, {end}) is no range of a prompt of {len(prompt)} characters")
    text = prompt[start:end]
    if not text.strip():
        raise DitAttnError(f"the piece ({start}, {end}) is white space")
    return [(start + len(text) - len(text.lstrip()), start + len(text.rstrip()))]


def _disjoint(starts: Iterable[int], length: int) -> list[int]:
    kept: list[int] = []
    for at in starts:
        if not kept or at >= kept[-1] + length:
            kept.append(at)
    return kept


def _joined(text: str, at: int) -> bool:
    """Whether the characters before and after a position are of one word; scripts without spaces have none."""
    if not 0 < at < len(text):
        return False
    pair = text[at - 1], text[at]
    return all(x.isalnum() and unicodedata.east_asian_width(x) not in "WF" for x in pair)


class Bounds:
    """Characters that mark positions in some texts; every position has its own."""

    def __init__(self, texts: Iterable[str]) -> None:
        used = set("".join(texts))
        self._free = (chr(code) for code in range(_FIRST, _FIRST + _COUNT) if chr(code) not in used)
        self._chars: dict[tuple[str, int, int], str] = {}

    def add(self, name: str, row: int, position: int) -> str:
        """Return the character that marks a position in a text, given by its argument and row."""
        key = (name, row, position)
        if key not in self._chars:
            char = next(self._free, None)
            if char is None:
                raise DitAttnError(f"more than {_COUNT} bounds of pieces in one call; ask for fewer pieces")
            self._chars[key] = char
        return self._chars[key]

    def insert(self, name: str, row: int, text: str) -> str:
        """Return the text with its marks."""
        marks = sorted((position, char) for (n, r, position), char in self._chars.items() if (n, r) == (name, row))
        for position, char in reversed(marks):
            text = text[:position] + char + text[position:]
        return text

    def remove(self, text: str) -> str:
        """Return the text without any mark."""
        return text.translate(dict.fromkeys(map(ord, self._chars.values())))

    def find(self, text: str, char: str) -> list[int]:
        """Return the positions of a mark in a text, counted without marks."""
        return [len(self.remove(text[:at])) for at, found in enumerate(text) if found == char]
