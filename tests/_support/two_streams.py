"""The dual path by its definition, in float64: a dense stream, and a windowed one that takes the text from it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

import dit_attn
from dit_attn.processors.core.call import AttentionCall, Request
from tests._support.outputs import same
from tests._support.recorded_calls import reference, weights
from tests._support.window_masks import window_bias


@dataclass
class TwoStreams:
    """Attention calls of both passes of one forward.

    Attributes:
        calls: with their outputs, in order.
        replaced: names of the layers whose text was replaced.
    """

    calls: list[tuple[AttentionCall, torch.Tensor]] = field(default_factory=list)
    replaced: set[str] = field(default_factory=set)

    def note(self, call: AttentionCall, request: Request, out: torch.Tensor) -> None:
        """Observe one call."""
        self.calls.append((call, out))
        joint = request.layout is not None and request.compute_visual is not None
        self.replaced |= {call.layer.name} if request.replacement is not None or joint else set()

    def check(self, window: tuple[int, ...]) -> None:
        """Compare every call with its definition."""
        texts: dict[Any, torch.Tensor] = {}
        for call, out in self.calls:
            key = call.layer.name, call.layer.rows[0]
            if call.kind != "self":
                assert call.pass_name == "twin" or same(out, texts[call.layer.name])
                texts.setdefault(call.layer.name, out)
                continue
            bias = None if call.pass_name == "twin" else window_bias(call.tokens, window)  # type: ignore[arg-type]
            expected = reference(call, Request(), bias)
            text, share = _text(call, bias)
            if text is not None and call.pass_name == "twin":
                texts[key] = text
            elif text is not None:
                assert share is not None
                expected[:, call.visual] += share * (texts[key] - text)
            rows = _valid(call)
            torch.testing.assert_close(out.double()[rows], expected[rows], atol=3e-5, rtol=2e-4)


def _text(call: AttentionCall, bias: torch.Tensor | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """What visual rows take from the text alone (B, Sv, H, Dv), and the share of the text (B, Sv, H, 1)."""
    text = torch.ones(call.k.shape[1], dtype=torch.bool)
    text[call.visual] = False
    if not text.any():
        return None, None
    found = weights(call, Request(), bias)[0][:, :, call.visual][..., text]
    v = call.v[:, text].transpose(1, 2).double().repeat_interleave(call.q.shape[2] // call.v.shape[2], 1)
    share = found.sum(-1, keepdim=True)
    return (found / share @ v).transpose(1, 2), share.transpose(1, 2)


def _valid(call: AttentionCall) -> Any:
    """Rows that are no padding, (B, S) bool."""
    from tests._support.cross_mixin import valid_rows

    return valid_rows(call)


@contextmanager
def two_streams(model: Any) -> Iterator[TwoStreams]:
    """Observe the calls of self attention and of attention to the text."""
    seen = TwoStreams()
    with dit_attn.observing(model, seen.note, sites=("self", "text")):
        yield seen
