"""A method that asks for logit biases and nothing else, and the matrix of what it asks for."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from dit_attn.processors.core.call import AttentionCall, Request
from dit_attn.processors.methods.base import Method

Entry = tuple[slice, slice, float]


@dataclass(frozen=True)
class SpanBiases(Method):
    """Lift half of the text for half of the image rows, and bar the text rows from a region of the image.

    Where no text is in the sequence, one region of the image is lifted and another barred for some image rows.
    """

    value: float = 1.1

    def request(self, call: AttentionCall, request: Request) -> None:
        """Add the biases."""
        if self.value:
            for rows, keys, value in entries(call, self.value):
                request.add_span_bias(call, rows, keys, value)
        else:
            request.add_span_bias(call, slice(None), slice(None), 0.0)


@dataclass(frozen=True)
class HeadBiases(SpanBiases):
    """The same, and a factor of each head for all rows; the first head of the layer has none."""

    def request(self, call: AttentionCall, request: Request) -> None:
        """Add the biases."""
        super().request(call, request)
        strength = torch.tensor([0.7 * head for head in range(call.heads.start, call.heads.stop)])[None, :, None, None]
        ramp = torch.linspace(-1.0, 1.0, call.q.shape[1])[None, None, :, None]
        request.add_bias(call, ramp * strength, ramp)


def entries(call: AttentionCall, value: float) -> Iterator[Entry]:
    """Rows, keys and value of every bias."""
    assert call.tokens is not None
    visual, texts = call.visual, [span for span in call.tokens.spans if span.kind == "text"]
    middle = (visual.start + visual.stop) // 2
    region = slice(middle + 8, middle + 48)
    yield slice(visual.start, middle), region, -value
    if not texts:
        yield slice(middle, visual.stop), slice(visual.start, visual.start + 40), -math.inf
    for text in texts:
        yield slice(visual.start, middle), slice(text.start, text.start + max(1, (text.length or 0) // 2)), value
        yield slice(text.start, text.stop), region, -math.inf


def bias_matrix(call: AttentionCall, value: float = 1.1) -> torch.Tensor:
    """(1, 1, S, S) fp64."""
    matrix = torch.zeros(1, 1, call.q.shape[1], call.q.shape[1], dtype=torch.float64)
    for rows, keys, amount in entries(call, value):
        matrix[:, :, rows, keys] += amount
    return matrix
