"""State of the enabled methods on one transformer of a stock diffusers pipeline."""

from __future__ import annotations

import copy
from typing import Any

import torch

from dit_attn.processors.attach.families import Family
from dit_attn.processors.attach.guider import PerturbedGuider
from dit_attn.processors.attach.transformer_run import TransformerRun
from dit_attn.processors.core.clock import Clock
from dit_attn.processors.methods.base import Method


class Session(TransformerRun):
    """State of the enabled methods on one transformer. Made by ``enable``; nothing in it needs to be reset by hand.

    Attributes:
        methods: the enabled methods, in order.
        installed: whether the layers run our processors.
        guider: runs the enabled guidance method, ``None`` without one.
    """

    methods: tuple[Method, ...]

    def __init__(
        self, model: torch.nn.Module, family: Family, methods: tuple[Method, ...], clock: Clock, pipe: Any = None
    ) -> None:
        super().__init__(model, family, methods, clock, pipe)
        self.installed = False
        self.guider: PerturbedGuider | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Session:
        if id(self) in memo:
            return memo[id(self)]
        model = memo.get(id(self.model))
        if model is None:
            raise TypeError("a Session is copied with its transformer: deepcopy the transformer instead")
        pipe = memo.get(id(self.owner))
        session = Session(model, self.family, self.methods, copy.deepcopy(self.clock, memo), pipe)
        session.installed = self.installed
        memo[id(self)] = session
        for layer in self.layers:
            session.add_layer(layer.name)
        if self.guider is not None:
            session.guider = self.guider.copy_for(session)
        return session

    def __repr__(self) -> str:
        return f"Session({self.family.name}, {self.layer_count} layers, methods={list(self.methods)})"
