"""Token layouts: spans add up, or the layout says that they do not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dit_attn.processors.core.tokens import VISUAL, Span, TokenLayout, visual_span

JOINT = TokenLayout((Span("text", None), visual_span("image", (1, 4, 5)), visual_span("reference", (1, 2, 3))))


def test_flexible_span_takes_what_remains() -> None:
    tokens = JOINT.resolve(33)
    assert tokens is not None
    assert [(span.kind, span.start, span.stop) for span in tokens.spans] == [
        ("text", 0, 7),
        ("image", 7, 27),
        ("reference", 27, 33),
    ]
    assert tokens.visual_range == (7, 33)
    assert tokens.grid == (1, 4, 5)


def test_missing_text_leaves_no_empty_span() -> None:
    tokens = JOINT.resolve(26)
    assert tokens is not None and [span.kind for span in tokens.spans] == ["image", "reference"]


@pytest.mark.parametrize("layout, seq_len", [(JOINT, 25), (TokenLayout((visual_span("video", (2, 2, 2)),)), 9)])
def test_lengths_that_do_not_add_up_are_not_resolved(layout: TokenLayout, seq_len: int) -> None:
    assert layout.resolve(seq_len) is None


def test_visual_tokens_apart_have_no_common_range() -> None:
    layout = TokenLayout((visual_span("reference", (1, 2, 2)), Span("text", 3), visual_span("image", (1, 2, 2))))
    tokens = layout.resolve(11)
    assert tokens is not None and tokens.visual_range is None


KINDS = st.sampled_from([*VISUAL, "text", "audio", "time", "padding"])


@given(lengths=st.lists(st.tuples(KINDS, st.integers(0, 9)), max_size=5), rest=st.integers(0, 20), at=st.integers(0, 5))
def test_resolved_spans_cover_the_sequence_in_order(lengths: list[tuple[str, int]], rest: int, at: int) -> None:
    spans: list[Span] = [Span(kind, length) for kind, length in lengths]
    spans.insert(at, Span("text", None))
    total = rest + sum(length for _, length in lengths)
    tokens = TokenLayout(tuple(spans)).resolve(total)
    assert tokens is not None and tokens.seq_len == total
    covered = [position for span in tokens.spans for position in range(span.start, span.stop)]
    assert covered == list(range(total)) and all(span.length for span in tokens.spans)
    assert tokens.visual == tuple(span for span in tokens.spans if span.kind in VISUAL)
    positions = [p for span in tokens.visual for p in range(span.start, span.stop)]
    together = bool(positions) and positions == list(range(positions[0], positions[-1] + 1))
    assert tokens.visual_range == ((positions[0], positions[-1] + 1) if together else None)


def test_two_flexible_spans_are_ambiguous() -> None:
    assert TokenLayout((Span("text", None), Span("audio", None))).resolve(8) is None


def test_a_visual_span_has_the_tokens_of_its_grid_and_references_do_not_count_as_the_grid() -> None:
    assert visual_span("video", (3, 4, 5)) == Span("video", 60, (3, 4, 5))
    tokens = TokenLayout((visual_span("reference", (1, 2, 2)), visual_span("image", (1, 3, 3)))).resolve(13)
    assert tokens is not None and tokens.grid == (1, 3, 3) and tokens.visual_range == (0, 13)
    alone = TokenLayout((visual_span("reference", (1, 2, 2)), Span("text", 3))).resolve(7)
    assert alone is not None and alone.grid is None
