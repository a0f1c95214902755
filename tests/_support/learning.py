"""Two small methods that learn: a logit bias per head, and a gate per head."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

from dit_attn.kernels import BlockLayout, Epilogue
from dit_attn.processors.core.call import AttentionCall, Request
from dit_attn.processors.core.parameters import LayerShape
from dit_attn.processors.methods import base
from dit_attn.processors.methods.base import setting
from dit_attn.processors.methods.learned import LearnedMethod


class PerHead(torch.nn.Module):
    """A number per head."""

    def __init__(self, shape: LayerShape, start: float) -> None:
        super().__init__()
        self.value = torch.nn.Parameter(torch.full((shape.heads,), start, dtype=shape.dtype))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self) -> torch.Tensor:
        """(1, H)."""
        return self.value[None]


@dataclass(frozen=True)
class SpanLift(LearnedMethod):
    """Visual rows attend more or less to the first half of the visual tokens, by a learned number per head."""

    slug: ClassVar[str] = "span-lift"

    start: float = setting(0.0, "first value")
    last_layer: bool = setting(True, "in the last layer too")

    def parameters_for(self, shape: LayerShape) -> torch.nn.Module | None:
        return PerHead(shape, self.start) if self.last_layer or shape.index < shape.count - 1 else None

    def request(self, call: AttentionCall, request: Request) -> None:
        if self.last_layer or call.layer.index < call.layer_count - 1:
            request.add_span_bias(call, call.visual, first_half(call), self.parameters(call)())


@dataclass(frozen=True)
class HeadGate(LearnedMethod):
    """Multiply the visual rows of every head by a learned number, in the kernel's epilogue."""

    slug: ClassVar[str] = "head-gate"
    role: ClassVar[str] = "sparse"

    start: float = setting(1.0, "first value")

    def parameters_for(self, shape: LayerShape) -> torch.nn.Module:
        return PerHead(shape, self.start)

    def request(self, call: AttentionCall, request: Request) -> None:
        layout = BlockLayout.dense(call.q[:, call.visual].shape[1], call.k.shape[1], device=call.q.device)
        request.layout = layout
        gate = self.parameters(call)()
        request.epilogue = Epilogue(row_scale=gate[..., None].expand(-1, -1, layout.nq))


def first_half(call: AttentionCall) -> slice:
    return slice(call.visual.start, (call.visual.start + call.visual.stop) // 2)


def values(model: Any) -> list[torch.nn.Parameter]:
    """The learned numbers of a transformer, in the order of its parameters."""
    return [parameter for name, parameter in model.named_parameters() if name.startswith("dit_attn.")]


@contextmanager
def registered(*kinds: type[base.Method]) -> Iterator[None]:
    """Know the methods by slug, as those of the package are known."""
    with pytest.MonkeyPatch.context() as patch:
        for kind in kinds:
            patch.setitem(base.REGISTRY, kind.slug, kind)
        yield


for _kind in (SpanLift, HeadGate):  # other tests list the methods of the package
    base.REGISTRY.pop(_kind.slug)
