"""Which tokens of the text a piece of a prompt became, in the order in which the transformer gets them."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dit_attn.errors import DitAttnError, shorten
from dit_attn.processors.attach.prompt_spans.encode import EncodedPiece, EncodedText, encode
from dit_attn.processors.attach.prompt_spans.pieces import Piece
from dit_attn.processors.attach.prompt_spans.text_parts import text_part_of


class PieceMissing(DitAttnError):
    """A piece is not in the prompt, or the length of the text cuts all of it off."""


@dataclass(frozen=True)
class PromptSpan:
    """Tokens that one text encoder made of a piece of a prompt.

    Attributes:
        piece: what was asked for.
        row: prompt of the list, 0 for a single one.
        chars: (start, end) of this occurrence in the prompt.
        encoder: component that encodes these tokens, ``"text_encoder_2"``; ``"transformer"`` where it embeds them.
        positions: places of the tokens in the text part of the transformer's sequence, from 0, ascending.
        tokens: the characters that every token stands for.
        cut: number of tokens of the piece that are missing since the prompt is too long.
    """

    piece: Piece
    row: int
    chars: tuple[int, int]
    encoder: str
    positions: tuple[int, ...]
    tokens: tuple[str, ...]
    cut: int = 0


def find_spans(pipe: Any, arguments: dict[str, Any], pieces: Sequence[Piece], negative: bool) -> list[PromptSpan]:
    """Return the spans of some pieces; arguments as for :func:`dit_attn.spans`."""
    prompts = arguments["negative_prompt" if negative else "prompt"]
    for name in text_part_of(pipe).variables:
        if arguments.get(name) is not None:
            raise DitAttnError(
                f"{type(pipe).__name__} prepares its {name} before it encodes it with the prompt; the tokens of a "
                "piece are known in a run only"
            )
    taken = inspect.signature(type(pipe).__call__).parameters
    defaults = {name: x.default for name, x in taken.items() if x.default not in (x.empty, None)}
    encoded = encode(pipe, {**defaults, **arguments}, pieces, negative)
    spans = [] if encoded is None else _spans(encoded)
    for piece in pieces:
        mine = [span for span in spans if span.piece == piece]
        if not mine:
            raise PieceMissing(f"the piece {shorten(piece)} is not in the prompt {shorten(prompts)}")
        if not any(span.positions for span in mine):
            names = ", ".join(dict.fromkeys(span.encoder for span in mine))
            raise PieceMissing(
                f"the prompt is cut off before the piece {shorten(piece)} ({names}); shorten it, or give a larger "
                "max_sequence_length"
            )
    return spans


def _spans(encoded: EncodedText) -> list[PromptSpan]:
    """The spans in an encoded text, of the encoders that the transformer gets tokens of."""
    present = set(encoded.marks.unique().tolist())
    heard = {id(row) for piece in encoded.pieces for row in [piece.tokens] if _in(row, present)}
    found = [_span(piece, encoded) for piece in encoded.pieces if id(piece.tokens) in heard]
    return sorted(dict.fromkeys(found), key=lambda span: (span.row, span.chars))


def _in(row: Any, present: set[int]) -> bool:
    return any(row.first + at in present for at, real in enumerate(row.real) if real)


def _span(piece: EncodedPiece, encoded: EncodedText) -> PromptSpan:
    repeats = len(encoded.marks) // encoded.prompts
    row = encoded.marks[piece.row * repeats]
    placed = [
        (at, piece.tokens.shown(mark)) for at, marks in enumerate(row.tolist()) for mark in piece.marks if mark in marks
    ]
    shown = {mark for marks in row.tolist() for mark in marks}
    return PromptSpan(
        piece.piece,
        piece.row,
        piece.chars,
        piece.tokens.encoder or "transformer",
        tuple(at for at, _ in placed),
        tuple(text for _, text in placed),
        piece.cut + sum(mark not in shown for mark in piece.marks),
    )
