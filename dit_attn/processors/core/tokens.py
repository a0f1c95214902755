"""Describe the parts of an attention sequence: text, video, image, reference, audio.

The order of the parts differs from family to family (text first or last, references before or after the image), so it
is data: a tuple of spans.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

VISUAL = ("video", "image", "reference")


@dataclass(frozen=True)
class Span:
    """A run of consecutive tokens of one kind.

    Attributes:
        kind: ``text | video | image | reference | condition | audio | time | padding``; a ``condition`` is
            frames apart from the visual tokens, which no method takes for some.
        length: number of tokens; ``None`` for the rest of the sequence (at most one span of a layout).
        grid: (T, H, W) token grid of a visual span, row-major, or ``None``.
        start: first token; set by :meth:`TokenLayout.resolve`.
    """

    kind: str
    length: int | None
    grid: tuple[int, int, int] | None = None
    start: int = 0

    @property
    def stop(self) -> int:
        """One past the last token of a resolved span."""
        return self.start + (self.length or 0)

    @property
    def visual(self) -> bool:
        """Whether the tokens are image or video content, the rows a sparse method applies to."""
        return self.kind in VISUAL


def visual_span(kind: str, grid: tuple[int, int, int]) -> Span:
    """Return a span of ``T * H * W`` tokens on a (T, H, W) grid."""
    t, h, w = (int(size) for size in grid)
    return Span(kind, t * h * w, (t, h, w))


class EmbeddedImage(NamedTuple):
    """An input image among the text, which may stand at another place in every batch row.

    Attributes:
        row: of the batch.
        start, stop: its tokens in the sequence.
        grid: (1, H, W) of its tokens, row-major, or ``None``.
    """

    row: int
    start: int
    stop: int
    grid: tuple[int, int, int] | None = None


@dataclass(frozen=True)
class Tokens:
    """A resolved sequence: spans with their positions, the total length, and two attributes of the layout."""

    spans: tuple[Span, ...]
    seq_len: int
    embedded: tuple[EmbeddedImage, ...] = ()
    keys_alone: tuple[str, ...] = ()

    @property
    def visual(self) -> tuple[Span, ...]:
        """The visual spans, in order."""
        return tuple(span for span in self.spans if span.visual)

    def references(self, row: int) -> tuple[Span, ...]:
        """The reference images of a batch row in the order of their numbers, those among its text included."""
        own = (Span("reference", b - a, grid, a) for at, a, b, grid in self.embedded if at == row)
        return (*(span for span in self.spans if span.kind == "reference"), *own)

    @cached_property
    def visual_range(self) -> tuple[int, int] | None:
        """``(start, stop)`` of the visual tokens when they are consecutive, else ``None``."""
        spans = self.visual
        if not spans or any(a.stop != b.start for a, b in pairwise(spans)):
            return None
        return spans[0].start, spans[-1].stop

    @cached_property
    def queries(self) -> tuple[tuple[int, int], ...]:
        """``(start, stop)`` of the runs of tokens that are queries too."""
        return _runs(span for span in self.spans if span.kind not in self.keys_alone)

    @cached_property
    def other_queries(self) -> tuple[tuple[int, int], ...]:
        """``(start, stop)`` of the runs of queries that are not visual."""
        return _runs(span for span in self.spans if span.kind not in self.keys_alone and not span.visual)

    @property
    def query_count(self) -> int:
        """Number of tokens that are queries."""
        return sum(stop - start for start, stop in self.queries)

    @property
    def grid(self) -> tuple[int, int, int] | None:
        """(T, H, W) of the generated image or video (references do not count)."""
        return next((span.grid for span in self.spans if span.kind in ("video", "image")), None)


@dataclass(frozen=True)
class TokenLayout:
    """The parts of a family's sequence for the current input, before the length of the text is known.

    Attributes:
        spans: the parts, in order.
        embedded: input images among the text, in the order in which the model embeds them; those of a row in the order
            of their numbers.
        others: layouts of layers that have another sequence, each with a shell pattern of their names.
        keys_alone: kinds of the spans whose tokens are keys alone: the layer has no queries of them, or has them
            attend to each other in calls of their own.
        apart: kinds of the spans whose tokens do not enter the layer with the others: their keys are those that an
            earlier call has stored, or they are a stream of their own.
    """

    spans: tuple[Span, ...]
    embedded: tuple[EmbeddedImage, ...] = ()
    others: tuple[tuple[str, TokenLayout], ...] = ()
    keys_alone: tuple[str, ...] = ()
    apart: tuple[str, ...] = ()

    @property
    def entering(self) -> TokenLayout:
        """The parts of the sequence that enters a layer with its positions: without those that are apart."""
        if not self.apart:
            return self
        return replace(self, spans=tuple(span for span in self.spans if span.kind not in self.apart))

    def of_layer(self, name: str) -> TokenLayout:
        """Return the layout of the sequence of a layer."""
        return next((other for pattern, other in self.others if fnmatch.fnmatchcase(name, pattern)), self)

    def is_among_keys(self, keys: int) -> bool:
        """Return whether a call with so many keys is one of tokens that are keys alone in the call of the sequence."""
        lengths = [span.length for span in self.spans if span.kind in self.keys_alone]
        return bool(lengths) and None not in lengths and keys <= sum(length or 0 for length in lengths)

    def resolve(self, seq_len: int) -> Tokens | None:
        """Return the spans with their positions in ``seq_len`` tokens; ``None`` when they cannot add up."""
        fixed = sum(span.length for span in self.spans if span.length is not None)
        flexible = [span for span in self.spans if span.length is None]
        rest = seq_len - fixed
        if rest < 0 or (rest > 0 and not flexible) or len(flexible) > 1:
            return None
        spans, start = [], 0
        for span in self.spans:
            length = rest if span.length is None else span.length
            if length:
                spans.append(replace(span, length=length, start=start))
            start += length
        return Tokens(tuple(spans), seq_len, self.embedded, self.keys_alone)


def _runs(spans: Iterable[Span]) -> tuple[tuple[int, int], ...]:
    """``(start, stop)`` of the runs that consecutive spans make."""
    runs: list[tuple[int, int]] = []
    for span in spans:
        if runs and runs[-1][1] == span.start:
            runs[-1] = (runs[-1][0], span.stop)
        else:
            runs.append((span.start, span.stop))
    return tuple(runs)
