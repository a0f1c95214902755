"""Token layouts: spans add up, or the layout says that they do not."""

from __future__ import annotations

import pytest

from dit_attn.processors.core.tokens import Span, TokenLayout, visual_span

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
