"""Let a pipeline encode a prompt with marked tokens: nothing of its templates, crops and cleaning is known here.

A copy of the pipeline runs its own ``encode_prompt`` with tokenizers that record and text encoders that return marks.
Where a mark comes out is where the transformer gets that token. The pipeline and its components are not touched.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils import _pytree as pytree

from dit_attn.errors import DitAttnError, reason, shorten
from dit_attn.processors.attach.components import COMPONENTS
from dit_attn.processors.attach.prompt_spans.marked_encoder import MarkedEncoder
from dit_attn.processors.attach.prompt_spans.pieces import Bounds, Piece, occurrences
from dit_attn.processors.attach.prompt_spans.recorded_tokenizer import (
    FIRST_MARK,
    TokenLog,
    TokenRow,
    overlaps,
    recording_copy,
)
from dit_attn.processors.attach.prompt_spans.text_parts import Leaf, TextPart, taken_by, text_part_of

Arguments = Mapping[str, Any]
"""Arguments of a pipeline's call that say what is encoded."""


@dataclass(frozen=True)
class EncodedPiece:
    """Tokens of one occurrence of a piece, in one text that the pipeline encoded.

    Attributes:
        piece: what was asked for.
        row: prompt of the list.
        chars: (start, end) in the prompt.
        tokens: the text that was tokenized.
        marks: marks of its tokens.
        cut: how many tokens truncation removed.
    """

    piece: Piece
    row: int
    chars: tuple[int, int]
    tokens: TokenRow
    marks: tuple[int, ...]
    cut: int


@dataclass(frozen=True)
class EncodedText:
    """Where the tokens of some prompts stand.

    Attributes:
        pieces: the pieces, by prompt and occurrence.
        marks: (rows, S, n) int64, marks of the tokens that every place of the text part holds.
        part: how the transformer gets the text.
        prompts: number of prompts; rows repeat each of them.
    """

    pieces: tuple[EncodedPiece, ...]
    marks: torch.Tensor
    part: TextPart
    prompts: int

    def places(self, marks: Sequence[int]) -> torch.Tensor:
        """Return the places that hold some tokens, (rows, S) bool."""
        return torch.isin(self.marks, torch.tensor(list(marks), dtype=torch.int64)).any(-1)


def encode(pipe: Any, arguments: Arguments, pieces: Sequence[Piece], negative: bool = False) -> EncodedText | None:
    """Return where the tokens of some pieces stand; ``None`` where no prompt has one of them.

    Args:
        pipe: a pipeline with tokenizers.
        arguments: arguments of its call.
        pieces: pieces of the prompts; a range is one of ``prompt``.
        negative: whether they are pieces of the negative prompts.

    Raises:
        DitAttnError: no prompt, a tokenizer without offsets, or a pipeline that cannot encode in this way.
    """
    part = text_part_of(pipe)
    main = "negative_prompt" if negative else "prompt"
    texts = {name: value for name, value in arguments.items() if _is_text(value) and _is_prompt(name, main)}
    if main not in texts:
        raise DitAttnError(f"the pipeline was given no {main}; its tokens are not known from embeddings")
    rows = {name: [value] if isinstance(value, str) else list(value) for name, value in texts.items()}
    if len(rows[main]) > 1 and any(not isinstance(piece, str) for piece in pieces):
        raise DitAttnError("a range of characters needs a single prompt; give the text of the piece")
    found = [
        (piece, name, row, chars)
        for piece in pieces
        for name, prompts in rows.items()
        if isinstance(piece, str) or name == main
        for row, prompt in enumerate(prompts)
        for chars in occurrences(prompt, piece)
    ]
    if not found:
        return None
    bounds = Bounds(text for prompts in rows.values() for text in prompts)
    marked = [tuple(bounds.add(name, row, at) for at in chars) for _, name, row, chars in found]
    given = {
        name: bounds.insert(name, 0, value)
        if isinstance(value, str)
        else [bounds.insert(name, row, text) for row, text in enumerate(value)]
        for name, value in texts.items()
    }
    log, leaves = _run(pipe, part, arguments, negative, TokenLog(bounds.remove, part.mark_ids))
    with_bounds, _ = _run(pipe, part, {**arguments, **given}, negative, TokenLog(bounds.remove, part.mark_ids))
    pairs = _paired(log, with_bounds)
    encoded = []
    for (piece, _, row, chars), (start, end) in zip(found, marked):
        for tokens, text in pairs:
            for a, b in zip(bounds.find(text, start), bounds.find(text, end)):
                cut = sum(overlaps(span, a, b) for span in tokens.cut)
                encoded.append(EncodedPiece(piece, row, chars, tokens, tuple(tokens.marks(a, b)), cut))
    rows_of = {id(piece.tokens) for piece in encoded}
    both = negative and "negative_prompt" in taken_by(pipe)  # prompts and negative prompts come out of one call
    ours = [call for call in log.calls if not both or any(id(tokens) in rows_of for tokens in call)]
    ranges = [(call[0].first, call[-1].first + len(call[-1].ids)) for call in ours]
    kept = [marks for leaf in leaves if (marks := _marks(leaf, ranges)) is not None]
    if not kept:
        raise DitAttnError(f"{type(pipe).__name__} encodes {shorten(rows[main][0])} in a way that shows no token")
    return EncodedText(tuple(encoded), part.assemble(pipe, kept), part, len(rows[main]))


def _is_text(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return bool(value) and all(isinstance(x, str) for x in value)
    return isinstance(value, str)


def _is_prompt(name: str, main: str) -> bool:
    """Whether an argument is ``prompt`` or one of its kind for another encoder, ``prompt_2``."""
    return name == main or (name.startswith(f"{main}_") and name[len(main) + 1 :].isdigit())


def _run(pipe: Any, part: TextPart, arguments: Arguments, negative: bool, log: TokenLog) -> tuple[TokenLog, list[Leaf]]:
    """Encode prompts, and return the log and what comes out."""
    twin = _marked_twin(pipe, log)
    given = {name: list(value) if isinstance(value, list) else value for name, value in arguments.items()}
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:  # what is cut off was said when the pipeline ran, or is said by us
        logger.setLevel(logging.ERROR)
    try:
        with torch.no_grad():
            results = [part.encode(twin, given, more, negative) for more in part.passes]
    except DitAttnError:
        raise
    except Exception as error:  # whatever a pipeline raises for arguments that it does not take
        raise DitAttnError(f"{type(pipe).__name__} cannot encode the prompt by itself: {reason(error)}") from error
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)
    leaves = pytree.tree_leaves(results, is_leaf=lambda x: isinstance(x, list) and _is_samples(x))
    return log, [leaf for leaf in leaves if isinstance(leaf, (torch.Tensor, list))]


def _is_samples(value: list[Any]) -> bool:
    return bool(value) and all(isinstance(x, torch.Tensor) and x.ndim == 2 for x in value)


def _marked_twin(pipe: Any, log: TokenLog) -> Any:
    """A copy of a pipeline whose tokenizers record and whose text encoders mark."""
    twin, tokenizers = copy.copy(pipe), 0
    for name, component in list(vars(pipe).items()):
        if name.startswith("text_encoder") and component is not None and hasattr(component, "config"):
            twin.__dict__[name] = MarkedEncoder(name, component, log)
        elif name in COMPONENTS and component is not None:
            twin.__dict__[name] = SimpleNamespace(dtype=torch.float32, config=component.config)
        elif (recorded := recording_copy(component, log)) is not None:
            twin.__dict__[name] = recorded
            tokenizers += 1
    if not tokenizers:
        raise DitAttnError(f"{type(pipe).__name__} has no tokenizer; load it with its tokenizers and text encoders")
    return twin


def _paired(log: TokenLog, with_bounds: TokenLog) -> list[tuple[TokenRow, str]]:
    """Every text that was tokenized, and the same with bounds.

    Raises:
        DitAttnError: they differ by more than the bounds.
    """
    rows, others = ([row for call in x.calls for row in call] for x in (log, with_bounds))
    same = len(rows) == len(others)
    if not same or not all(a.text.startswith(b.text) or b.text.startswith(a.text) for a, b in zip(rows, others)):
        raise DitAttnError(
            "the pipeline rewrites the prompt at a bound of the piece before it is encoded; ask for a longer piece, "
            "or write the prompt as it is encoded"
        )
    return [(a, b.marked) for a, b in zip(rows, others)]


def _marks(leaf: Leaf, ranges: Sequence[tuple[int, int]]) -> torch.Tensor | None:
    """The marks in a result, (rows, S, n) int64, 0 for no token; ``None`` where it has none of some ranges."""
    if isinstance(leaf, list):
        leaf = torch.nn.utils.rnn.pad_sequence(leaf, batch_first=True)
    if leaf.ndim < 3 or leaf.dtype not in (torch.float32, torch.float64, torch.int64):
        return None
    marks = leaf.flatten(0, -4)[-1].long() if leaf.ndim > 3 else leaf.long()  # a layer of several
    inside = sum(((marks >= max(low, FIRST_MARK)) & (marks < high)) for low, high in ranges)
    if not isinstance(inside, torch.Tensor) or not inside.any():
        return None
    marks = marks.where(marks >= FIRST_MARK, 0)
    columns = torch.unique(marks.flatten(0, 1), dim=1)
    return columns.unflatten(0, marks.shape[:2])
