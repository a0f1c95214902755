"""Split a prompt into the pieces that say one thing each: at commas, semicolons, sentences, and "and"."""

from __future__ import annotations

import re

from dit_attn.errors import DitAttnError, shorten

SPLITS = ("clauses", "release")

_TAG = re.compile(r"<img>.*?</img>|<\|image_\d+\|>", re.DOTALL)  # images in a prompt of OmniGen
_CUT = re.compile(r"[,;\n。，；]|[.!?](?=\s|$)|\s(?=(?:and|then|also)\s)", re.IGNORECASE)
_JOINING = ("and", "then", "also", "with")
_LEAD = re.compile(rf"(?:\s|(?:{'|'.join(_JOINING)})\b(?=\s))+", re.IGNORECASE)
_COMMA = re.compile(",")
_WORD = re.compile(r"\s*\S+")


def split_prompt(prompt: str, how: str = "clauses") -> tuple[tuple[int, int], ...]:
    """Return the pieces of a prompt, (start, end) in characters, in order.

    Args:
        prompt: the text.
        how: ``clauses``: at commas, semicolons, ends of sentences, line breaks, and before "and", "then", "also"; these
            words are left out. ``release``: as the code of SaaS (arXiv 2507.16240) does, at commas alone, and the word
            after a comma is left out whatever it is.

    Raises:
        DitAttnError: no piece has a letter or a digit.
    """
    text = _TAG.sub(lambda found: "," + " " * (len(found.group()) - 1), prompt)  # same length: positions stay
    bounds, start = [], 0
    for cut in (_CUT if how == "clauses" else _COMMA).finditer(text):
        bounds.append((start, cut.start()))
        start = cut.end()
    bounds.append((start, len(text)))
    lead = _LEAD if how == "clauses" else None
    pieces = []
    first = True
    for a, b in bounds:
        piece = text[a:b]
        if lead is None and not first:
            word = _WORD.match(piece)
            a += word.end() if word else 0
        elif lead is not None and (found := lead.match(piece)):
            a += found.end()
        first = first and not any(char.isalnum() for char in piece)
        piece = text[a:b]
        a, b = a + len(piece) - len(piece.lstrip()), b - (len(piece) - len(piece.rstrip()))
        joining = lead is not None and text[a:b].lower() in _JOINING
        if any(char.isalnum() for char in text[a:b]) and not joining:
            pieces.append((a, b))
    if not pieces:
        raise DitAttnError(f"the prompt {shorten(prompt)} has no piece with a letter or a digit; give the pieces")
    return tuple(pieces)
