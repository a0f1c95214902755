"""A method that moves the visual tokens and nothing else, and the tables that a layer gets with it."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch

import dit_attn
from dit_attn.processors.attach import attach, attention_processor, rotary
from dit_attn.processors.core.call import AttentionCall, Request
from dit_attn.processors.core.positions import PositionMap, PositionSite
from dit_attn.processors.methods.base import Method


@dataclass(frozen=True)
class Placed(Method):
    """Move the tokens by fixed maps."""

    maps: Any = ()

    def __post_init__(self) -> None:
        """Nothing to check."""

    def request(self, call: AttentionCall, request: Request) -> None:
        """Nothing."""

    def positions(self, site: PositionSite) -> PositionMap | tuple[PositionMap, ...] | None:
        """The maps."""
        return self.maps


def along(axis: int, value: float, rest: float) -> tuple[float, float, float]:
    """``value`` on one axis, ``rest`` on the others."""
    t, h, w = (value if i == axis else rest for i in range(3))
    return t, h, w


class Tables:
    """The rotary tables that the first wrapped layer of a model gets in one forward."""

    def __init__(self, model: Any, args: dict[str, Any]) -> None:
        self.maps: list[PositionMap] = []
        dit_attn.enable(model, Placed(self.maps))
        session = attach.session_of(model)
        assert session is not None
        self.model, self.session, self.layer = model, session, session.layers[0]
        self.parameters = type(session.module(self.layer).processor)._dit_rotary
        stock = attention_processor.moved_arguments
        attention_processor.moved_arguments = self._see  # type: ignore[assignment]
        try:
            with torch.no_grad():
                model(**copy.deepcopy(args), return_dict=False)
        finally:
            attention_processor.moved_arguments = stock

    def _see(self, session: Any, layer: Any, parameters: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if layer is self.layer:
            self.args, self.kwargs = args, kwargs
        return args, kwargs

    def given(self, *maps: PositionMap) -> Any:
        """The argument with the tables, as the processor gets it."""
        self.maps[:] = maps
        args, kwargs = rotary.moved_arguments(self.session, self.layer, self.parameters, self.args, self.kwargs)
        found = [args[place] if place < len(args) else kwargs.get(name) for name, place in self.parameters]
        return next(value for value in found if value is not None)

    def rows(self, *maps: PositionMap) -> torch.Tensor:
        """(S, K) complex128: cosine and sine of every column of every row."""
        form, leaves = rotary._flatten(self.given(*maps))
        leaves = rotary._per_token(leaves, form)
        axis = rotary._find_tokens(self.session, self.layer, leaves, form).axis
        cos, sin = (x.double().movedim(axis, 0).flatten(1) for x in rotary._cos_sin(leaves, form))
        return torch.complex(cos, sin)

    def grid(self, *maps: PositionMap) -> torch.Tensor:
        """(T, H, W, K) of the generated image or video."""
        rows = self.rows(*maps)
        assert self.session.layout is not None
        tokens = self.session.layout.entering.resolve(len(rows))
        assert tokens is not None and tokens.grid is not None
        span = next(span for span in tokens.visual if span.kind != "reference")
        return rows[span.start : span.stop].unflatten(0, tokens.grid)
