"""A pipeline whose transformer predicts known tensors, with the real machinery of a guidance method on it."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import dit_attn
from dit_attn.processors.attach import attach, sites
from dit_attn.processors.attach.families import families
from dit_attn.processors.core import cfg
from dit_attn.processors.methods.base import Method

C, U, P = (torch.randn(1, 4, 3, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2, 3))
STEPS = 8


class FakeTransformer(torch.nn.Module):
    """Predicts C, U or P, whatever it is given; P where its one attention layer runs perturbed."""

    config = SimpleNamespace(in_channels=4)

    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList([torch.nn.Module() for _ in range(2)])
        for block in self.blocks:
            block.attn1 = torch.nn.Module()
            block.attn1.heads = 4
        self.asked: list[tuple[str, ...]] = []

    def forward(
        self, hidden_states: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor | None = None
    ) -> tuple[torch.Tensor]:
        session = attach.session_of(self)
        assert session is not None
        names = session.rows_by_branch()
        self.asked.append(names)
        known = {"cond": C, "uncond": U, "perturbed": P, "image": 0.5 * U + 0.25 * C}
        return (torch.cat([known[name] for name in names]).to(hidden_states.dtype),)


class FakeScheduler:
    """Remembers the predictions it is handed."""

    def __init__(self) -> None:
        self.timesteps = torch.linspace(900.0, 100.0, STEPS)
        self.got: list[torch.Tensor] = []
        self.step_index: int | None = None

    def begin(self) -> None:
        self.timesteps, self.got, self.step_index = self.timesteps.clone(), [], 0

    def step(self, model_output: torch.Tensor, *rest: Any, **more: Any) -> torch.Tensor:
        self.got.append(model_output)
        assert self.step_index is not None
        self.step_index += 1
        return model_output


class FakePipe:
    """Runs classifier-free guidance the way a style says, at ``_guidance_scale``."""

    def __init__(self, style: str, scale: Any, dtype: torch.dtype = torch.float32) -> None:
        self.style, self.scale, self.dtype = style, scale, dtype
        self._guidance_scale = scale if isinstance(scale, float) else None
        self.scheduler, self.transformer = FakeScheduler(), FakeTransformer()
        self.guides = self.scale != 1.0

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self.guides

    def __call__(self, guidance_scale: float | None = None, predict: int | None = None) -> list[torch.Tensor]:
        if predict is not None:  # a call that ends between the prediction of a step and the scheduler
            return [self._predict(self.scheduler.timesteps[predict], self.scale)]
        if guidance_scale is not None:
            self.scale = self._guidance_scale = guidance_scale
            self.guides = guidance_scale != 1.0
        self.scheduler.begin()
        for index, timestep in enumerate(self.scheduler.timesteps):
            scale = self.scale(index) if callable(self.scale) else self.scale
            prediction = self._predict(timestep, scale)
            self.scheduler.step(prediction)
        return self.scheduler.got

    def _predict(self, timestep: torch.Tensor, scale: Any) -> torch.Tensor:
        x = torch.zeros(1, 4, 3, dtype=self.dtype)
        if not self.guides:
            return self.transformer(x, timestep.expand(1))[0]
        if self.style == "separate":
            cond = self.transformer(x, timestep.expand(1))[0]
            uncond = self.transformer(x, timestep.expand(1))[0]
        elif self.style == "three-way":
            out = self.transformer(x.expand(3, -1, -1), timestep.expand(3))[0]
            cond, uncond, image = out.chunk(3)
            return uncond + 1.6 * (image - uncond) + scale * (cond - image)
        else:
            uncond, cond = self.transformer(x.expand(2, -1, -1), timestep.expand(2))[0].chunk(2)
        return uncond + scale * (cond - uncond)


STYLES = {
    "separate": cfg.SEPARATE,
    "batched": cfg.BATCHED,
    "three-way": cfg.CFGRule("batched", ("cond", "uncond"), ("cond", "uncond", "image")),
}


def fake(monkeypatch: pytest.MonkeyPatch, method: Method, style: str, scale: Any, **more: Any) -> FakePipe:
    """A fake pipeline with a method on it; its family row is made up, all else is the real machinery."""
    pipe = FakePipe(style, scale, **more)
    wan = next(row for row in families() if row.name == "wan")
    row = dataclasses.replace(wan, cfg=STYLES[style])
    for module in (attach, sites):
        monkeypatch.setattr(module, "family_of", lambda model, kinds=(): row)
        monkeypatch.setattr(module, "tap_of", lambda *_: "torch")
    monkeypatch.setattr(attach, "eligible_layers", lambda *_: ["blocks.0.attn1", "blocks.1.attn1"])
    monkeypatch.setattr(attach, "session_processors", lambda *_: {})
    monkeypatch.setattr(attach, "rewrap", lambda *_: None)
    pipe.transformer.eval()  # as `from_pretrained` leaves it
    for block in pipe.transformer.blocks:
        block.attn1.processor = None
    dit_attn.enable(pipe, method)
    return pipe


def expected(style: str, scale: float) -> torch.Tensor:
    if scale == 1.0:
        return C
    if style == "three-way":
        image = 0.5 * U + 0.25 * C
        return U + 1.6 * (image - U) + scale * (C - image)
    return U + scale * (C - U)
