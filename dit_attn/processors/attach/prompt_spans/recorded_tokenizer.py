"""Record what the tokenizers of a pipeline are given, and which characters every token comes from."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

from dit_attn.errors import DitAttnError, reason, shorten

FIRST_MARK = 1 << 20  # marks are float32 in the encoders' results, apart from the small numbers of masks and positions
LAST_MARK = 1 << 24


@dataclass(eq=False)
class TokenRow:
    """Tokens of one text.

    Attributes:
        text: what was tokenized.
        marked: the same with the bounds of pieces.
        ids: token ids, with special tokens and padding.
        offsets: (start, end) in ``text`` of every token; empty for special tokens and padding.
        real: whether a token is no padding.
        cut: offsets of the tokens that truncation removed.
        first: mark of the first token; those of the others follow.
        encoder: name of the component that encoded it, ``""`` if none did.
    """

    text: str
    marked: str
    ids: list[int]
    offsets: list[tuple[int, int]]
    real: list[bool]
    cut: list[tuple[int, int]]
    first: int
    encoder: str = ""

    def marks(self, start: int, end: int) -> list[int]:
        """Return the marks of the tokens that overlap a range of characters."""
        return [self.first + at for at, span in enumerate(self.offsets) if overlaps(span, start, end)]

    def marked_ids(self) -> list[int]:
        """Return the token ids with marks in the place of those that stand for text."""
        spans = enumerate(zip(self.ids, self.offsets))
        return [self.first + at if start < end else token for at, (token, (start, end)) in spans]

    def shown(self, mark: int) -> str:
        """Return the characters of a token, by its mark."""
        start, end = self.offsets[mark - self.first]
        return self.text[start:end]


def overlaps(span: tuple[int, int], start: int, end: int) -> bool:
    """Whether a token has characters of a range."""
    return span[0] < span[1] and span[0] < end and span[1] > start


@dataclass
class TokenLog:
    """Calls of the tokenizers of a pipeline, in order.

    Attributes:
        unmark: removes the bounds of pieces from a text.
        calls: the rows of every call.
        mark_ids: whether the tokenizers return marks in the place of token ids, special tokens aside.
    """

    unmark: Callable[[str], str]
    mark_ids: bool = False
    calls: list[list[TokenRow]] = field(default_factory=list)
    _next: int = FIRST_MARK

    def tokenize(self, tokenize: Callable[..., Any], tokenizer: Any, text: Any, args: Any, kwargs: Any) -> Any:
        """Tokenize a text or a list of texts without bounds, and record it."""
        texts = [text] if isinstance(text, str) else text
        if not isinstance(texts, (list, tuple)) or not all(isinstance(x, str) for x in texts):
            return tokenize(text, *args, **kwargs)
        plain = [self.unmark(x) for x in texts]
        out = tokenize(plain[0] if isinstance(text, str) else plain, *args, **kwargs)
        encodings = getattr(out, "encodings", None)
        rows = []
        for index, (clean, marked) in enumerate(zip(plain, texts)):
            if encodings is not None:
                row = self._row(clean, marked, encodings[index])
            else:
                ids = out["input_ids"]
                ids = ids[index] if _nested(ids) else ids
                row = self._slow_row(tokenizer, clean, marked, [int(x) for x in ids], kwargs)
            rows.append(row)
            self._next += len(row.ids)
        if self._next > LAST_MARK:
            raise DitAttnError("too many tokens in one call of the pipeline; give fewer prompts at once")
        self.calls.append(rows)
        if self.mark_ids:
            marked_ids = [row.marked_ids() for row in rows]
            out["input_ids"] = marked_ids[0] if isinstance(text, str) else marked_ids
        return out

    def _row(self, text: str, marked: str, encoding: Any) -> TokenRow:
        """The row of a fast tokenizer's encoding."""
        real = [bool(x) for x in encoding.attention_mask]
        offsets = [span if kept else (0, 0) for span, kept in zip(encoding.offsets, real)]
        cut = [span for part in encoding.overflowing for span in part.offsets if span[0] < span[1]]
        return TokenRow(text, marked, list(encoding.ids), offsets, real, cut, self._next)

    def _slow_row(self, tokenizer: Any, text: str, marked: str, ids: list[int], kwargs: Any) -> TokenRow:
        """The row of a tokenizer without offsets: those of all tokens of the text, where its ids are the first."""
        full, offsets = _offsets(tokenizer, text, kwargs.get("add_special_tokens", True))
        pad, start = tokenizer.pad_token_id, 0
        if tokenizer.padding_side == "left":
            while start < len(ids) and ids[start] == pad and ids[start:] != full:
                start += 1
        body = ids[start:]
        same = next((at for at, (x, y) in enumerate(zip(body, full)) if x != y), min(len(body), len(full)))
        rest = [at for at in range(same, len(full)) if offsets[at][0] == offsets[at][1]]  # special tokens stay
        kept = same + len(rest)
        if body[same:kept] != [full[at] for at in rest] or any(x != pad for x in body[kept:]):
            raise DitAttnError(
                f"{type(tokenizer).__name__} has no offsets, and its fast form reads {shorten(text)} in another way; "
                "load the fast tokenizer"
            )
        spans = [(0, 0)] * start + offsets[:same] + [(0, 0)] * (len(body) - same)
        cut = [span for span in offsets[same:] if span[0] < span[1]]
        real = [start <= at < start + kept for at in range(len(ids))]
        return TokenRow(text, marked, ids, spans, real, cut, self._next)


def recording_copy(part: Any, log: TokenLog) -> Any:
    """Return a copy of a tokenizer, or of a processor around one, whose calls are recorded; ``None`` for others."""
    if _is_tokenizer(part):
        twin = copy.copy(part)
        stock = type(part)

        def call(self: Any, text: Any = None, *args: Any, **kwargs: Any) -> Any:
            return log.tokenize(lambda *a, **k: stock.__call__(self, *a, **k), self, text, args, kwargs)

        twin.__class__ = type(stock.__name__, (stock,), {"__call__": call})
        return twin
    for name in ("tokenizer", "text_tokenizer"):
        if _is_tokenizer(getattr(part, name, None)):
            twin = copy.copy(part)
            twin.__dict__[name] = recording_copy(getattr(part, name), log)
            return twin
    return None


def _is_tokenizer(part: Any) -> bool:
    from transformers import PreTrainedTokenizerBase

    return isinstance(part, PreTrainedTokenizerBase)


def _nested(ids: Sequence[Any]) -> bool:
    return len(ids) > 0 and hasattr(ids[0], "__len__")


def _offsets(tokenizer: Any, text: str, special: bool) -> tuple[list[int], list[tuple[int, int]]]:
    """The ids of a text and the offsets of its tokens, for a tokenizer that gives none; empty for special tokens.

    Raises:
        DitAttnError: it is no tokenizer of bytes and has no fast form.
    """
    pieces = _bytes_of(tokenizer, text)
    if pieces is None:
        ids, spans = _fast_offsets(tokenizer, text)
    else:
        ids = tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text))
        bounds = list(accumulate(map(len, pieces), initial=0))
        chars = [at for at, char in enumerate(text) for _ in char.encode()]
        spans = [(chars[a], chars[b - 1] + 1) for a, b in pairwise(bounds)]
    full = tokenizer.build_inputs_with_special_tokens(ids) if special else ids
    head = next(at for at in range(len(full) - len(ids) + 1) if full[at : at + len(ids)] == ids)
    return full, [(0, 0)] * head + spans + [(0, 0)] * (len(full) - head - len(ids))


def _fast_offsets(tokenizer: Any, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """The ids and offsets that the fast form of a tokenizer gives, without special tokens."""
    try:
        from transformers.convert_slow_tokenizer import convert_slow_tokenizer

        encoding = convert_slow_tokenizer(tokenizer).encode(text, add_special_tokens=False)
    except Exception as error:  # a kind that is not known, a library that is missing
        raise DitAttnError(
            f"{type(tokenizer).__name__} has no offsets and no fast form ({reason(error)}); load a fast tokenizer"
        ) from None
    return list(encoding.ids), list(encoding.offsets)


def _bytes_of(tokenizer: Any, text: str) -> list[bytes] | None:
    """The bytes of every token, where they make up the text: tokenizers of bytes, such as ByT5's."""
    tokens = tokenizer.tokenize(text)
    pieces = [bytes([ord(x)]) if len(x) == 1 and ord(x) < 256 else x.encode() for x in tokens]
    return pieces if b"".join(pieces) == text.encode() else None
