"""The user's attention backend: declined calls use it, whenever it was set, and disable leaves it as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import attention_backend

import dit_attn
from dit_attn.processors.attach import compat
from tests._support.compose import SPARSE, WARM, forward, same, tiny

NAMES = ("wan", "flux")


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the backends that ran, in order; ``flex`` stands in as a second backend that a CPU has."""
    registry = attention_dispatch._AttentionBackendRegistry
    native = registry._backends[attention_dispatch.AttentionBackendName.NATIVE]
    seen: list[str] = []

    def watched(name: str, shift: float) -> Any:
        def run(*args: Any, **kwargs: Any) -> torch.Tensor:
            seen.append(name)
            return native(*args, **kwargs) + shift

        return run

    for name, shift in (("native", 0.0), ("flex", 0.125)):
        member = attention_dispatch.AttentionBackendName(name)
        arguments = registry._supported_arg_names[attention_dispatch.AttentionBackendName.NATIVE]
        monkeypatch.setitem(registry._backends, member, watched(name, shift))
        monkeypatch.setitem(registry._supported_arg_names, member, arguments)
        monkeypatch.setitem(registry._constraints, member, [])
    return seen


def backends(model: Any) -> dict[str, Any]:
    """What the user sees on every processor."""
    return {
        name: getattr(module.processor, "_attention_backend", None)
        for name, module in model.named_modules()
        if hasattr(module, "processor")
    }


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("before", [True, False])
def test_declined_calls_use_the_backend_that_was_set(name: str, before: bool, used: list[str]) -> None:
    model, args = tiny(name)
    stock = forward(model, args)
    if before:
        model.set_attention_backend("flex")  # type: ignore[operator]
    dit_attn.enable(model)
    if not before:
        model.set_attention_backend("flex")  # type: ignore[operator]
    used.clear()
    ours = forward(model, args)
    assert set(used) == {"flex"} and not same(stock, ours)
    dit_attn.disable(model)
    assert set(backends(model).values()) == {"flex"}
    assert same(ours, forward(model, args))


@pytest.mark.parametrize("name", NAMES)
def test_engaged_layers_leave_the_backend_to_the_declined_step(name: str, used: list[str]) -> None:
    model, args = tiny(name)
    layers = len(dit_attn.enable(model, WARM).layers)
    model.set_attention_backend("flex")  # type: ignore[operator]
    used.clear()
    forward(model, args)  # the dense first step
    assert dit_attn.summary(model).fallbacks == {"dense step": layers}
    warm_up, cross = len(used), len(used) - layers
    assert set(used) == {"flex"}
    used.clear()
    forward(model, args, timestep=args["timestep"] * 0.5)
    assert dit_attn.summary(model).sparse_calls == layers
    assert used.count("flex") == cross < warm_up


@pytest.mark.parametrize("name", NAMES)
def test_reset_goes_back_to_the_default_backend(name: str, used: list[str]) -> None:
    model, args = tiny(name)
    stock = forward(model, args)
    model.set_attention_backend("flex")  # type: ignore[operator]
    dit_attn.enable(model, dit_attn.BlockSparse(density=1.0))
    model.reset_attention_backend()  # type: ignore[operator]
    with attention_backend("native"):  # the process-wide choice is not reset by diffusers
        used.clear()
        assert same(stock, forward(model, args))
    assert set(used) == {"native"}
    dit_attn.disable(model)
    assert set(backends(model).values()) == {None}


@pytest.mark.parametrize("name", NAMES)
def test_context_manager_chooses_for_declined_calls(name: str, used: list[str]) -> None:
    model, args = tiny(name)
    with attention_backend("flex"):
        expected = forward(model, args)
    dit_attn.enable(model)
    with attention_backend("flex"):
        used.clear()
        assert same(expected, forward(model, args))
    assert set(used) == {"flex"}
    used.clear()
    forward(model, args)
    assert set(used) == {"native"}


@pytest.mark.parametrize("name", NAMES)
def test_a_never_set_backend_leaves_no_trace(name: str) -> None:
    model, args = tiny(name)
    before = {n: dict(m.processor.__dict__) for n, m in model.named_modules() if hasattr(m, "processor")}
    dit_attn.enable(model, SPARSE)
    forward(model, args)
    dit_attn.disable(model)
    assert {n: dict(m.processor.__dict__) for n, m in model.named_modules() if hasattr(m, "processor")} == before


def test_our_backend_cannot_be_chosen_by_name() -> None:
    model, _ = tiny("wan")
    dit_attn.enable(model)
    with pytest.raises(ValueError, match="must be one of"):
        model.set_attention_backend(compat.BACKEND_VALUE)  # type: ignore[operator]
