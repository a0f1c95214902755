"""A small model, its noise and conditionings, and the module that nodes import at run time."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from tests._support import fake_comfyui as comfy


@pytest.fixture
def model() -> comfy.FakePatcher:
    """A model of two blocks, and 320 tokens of its noise."""
    torch.manual_seed(0)
    return comfy.FakePatcher(comfy.FakeModel().requires_grad_(False))


@pytest.fixture
def noise() -> torch.Tensor:
    """Latents (1, 4, 5, 16, 16)."""
    return torch.randn(1, 4, 5, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def conds() -> list[Any]:
    """A conditional and an unconditional text, with their names."""
    generator = torch.Generator().manual_seed(2)
    return [(name, torch.randn(1, 12, 16, generator=generator)) for name in ("first", "second")]


@pytest.fixture(autouse=True)
def samplers(monkeypatch: pytest.MonkeyPatch) -> None:
    """``comfy.samplers`` of the fake."""
    package, module = ModuleType("comfy"), ModuleType("comfy.samplers")
    module.calc_cond_batch = comfy.calc_cond_batch  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "comfy", package)
    monkeypatch.setitem(sys.modules, "comfy.samplers", module)
