"""Processors that name an attention backend themselves: their calls reach the methods, or are counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import attention_backend, dispatch_attention_fn
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

import dit_attn
from dit_attn.processors.attach.named_backend import UNSEEN, names_backend
from tests._support.compose import SPARSE, forward, same, tiny

SHIFTED = "flex"  # stands in as a second backend that a CPU has


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the backends that ran, in order."""
    registry = attention_dispatch._AttentionBackendRegistry
    names = attention_dispatch.AttentionBackendName
    native, seen = registry._backends[names.NATIVE], []

    def watched(name: str, shift: float) -> Any:
        def run(*args: Any, **kwargs: Any) -> torch.Tensor:
            seen.append(name)
            return native(*args, **kwargs) + shift

        return run

    for name, shift in (("native", 0.0), (SHIFTED, 0.125)):
        member = names(name)
        monkeypatch.setitem(registry._backends, member, watched(name, shift))
        monkeypatch.setitem(registry._supported_arg_names, member, registry._supported_arg_names[names.NATIVE])
        monkeypatch.setitem(registry._constraints, member, [])
    return seen


class Qkv:
    """The projections of Wan's self attention, without norms of the heads and positions."""

    def project(self, attn: Any, x: torch.Tensor) -> list[torch.Tensor]:
        return [layer(x).unflatten(2, (attn.heads, -1)) for layer in (attn.to_q, attn.to_k, attn.to_v)]


class NamesOne(Qkv):
    """Names a backend in one of two calls, as the first step of Qwen-Image 2.1 does."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self, attn: Any, hidden_states: Any, encoder_hidden_states: Any = None, attention_mask: Any = None,
        rotary_emb: Any = None,
    ) -> torch.Tensor:  # fmt: skip
        q, k, v = self.project(attn, hidden_states)
        if encoder_hidden_states is not None:
            out = dispatch_attention_fn(q, k, v, backend=self._attention_backend)
        else:
            out = dispatch_attention_fn(q, k, v, backend="flex")
        return attn.to_out[0](out.flatten(2))


class NamesNone(NamesOne):
    """Takes the active backend, whatever was set on it."""

    def __call__(
        self, attn: Any, hidden_states: Any, encoder_hidden_states: Any = None, attention_mask: Any = None,
        rotary_emb: Any = None,
    ) -> torch.Tensor:  # fmt: skip
        q, k, v = self.project(attn, hidden_states)
        assert self._attention_backend is not ...
        return attn.to_out[0](dispatch_attention_fn(q, k, v, backend=None).flatten(2))


COUNT = 0


class WritesGlobals(NamesOne):
    """Code that no copy can stand for."""

    def __call__(
        self, attn: Any, hidden_states: Any, encoder_hidden_states: Any = None, attention_mask: Any = None,
        rotary_emb: Any = None,
    ) -> torch.Tensor:  # fmt: skip
        global COUNT
        COUNT += 1
        q, k, v = self.project(attn, hidden_states)
        assert self._attention_backend is not ...
        return attn.to_out[0](dispatch_attention_fn(q, k, v, backend="flex").flatten(2))


class HasNoAttribute(Qkv):
    """A processor on which no backend can be set."""

    def __call__(
        self, attn: Any, hidden_states: Any, encoder_hidden_states: Any = None, attention_mask: Any = None,
        rotary_emb: Any = None,
    ) -> torch.Tensor:  # fmt: skip
        q, k, v = self.project(attn, hidden_states)
        return attn.to_out[0](dispatch_attention_fn(q, k, v, backend="flex").flatten(2))


def wan_with(processor: type) -> tuple[Any, dict[str, Any]]:
    """A tiny Wan whose self attention has processors of a class."""
    model, args = tiny("wan")
    for block in model.blocks:
        block.attn1.set_processor(processor())
    return model, args


def test_code_that_names_a_backend_is_told_from_code_that_hands_on_what_was_set() -> None:
    found = {kind.__name__: names_backend(kind.__call__) for kind in (WanAttnProcessor, FluxAttnProcessor, NamesOne)}
    assert found == {"WanAttnProcessor": False, "FluxAttnProcessor": False, "NamesOne": True}


@pytest.mark.parametrize("kind", [NamesOne, NamesNone])
def test_a_named_backend_computes_stock_attention_and_methods_see_the_call(kind: type, used: list[str]) -> None:
    model, args = wan_with(kind)
    stock = forward(model, args)
    assert (SHIFTED in used) is (kind is NamesOne)
    dit_attn.enable(model)
    model.set_attention_backend("native" if kind is NamesOne else SHIFTED)  # neither looks at it in self attention
    before = list(used)
    used.clear()
    ours = forward(model, args)
    assert dit_attn.summary(model).calls == 2
    if kind is NamesOne:
        assert same(stock, ours) and used == before
    dit_attn.enable(model, SPARSE)
    forward(model, args)
    summary = dit_attn.summary(model)
    assert summary.sparse_calls == summary.calls == 2


def test_no_named_backend_is_the_active_one(used: list[str]) -> None:
    model, args = wan_with(NamesNone)
    with attention_backend(SHIFTED):
        stock = forward(model, args)
        dit_attn.enable(model)
        assert same(stock, forward(model, args))
    assert SHIFTED in used


@pytest.mark.parametrize("kind", [WritesGlobals, HasNoAttribute])
def test_calls_that_cannot_be_seen_are_counted_with_the_reason(kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    registry, name = attention_dispatch._AttentionBackendRegistry, attention_dispatch.AttentionBackendName("flex")

    def own(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **_: Any) -> torch.Tensor:
        return value + query - key  # nothing that torch knows as attention

    monkeypatch.setitem(registry._backends, name, own)
    monkeypatch.setitem(registry._constraints, name, [])
    model, args = wan_with(kind)
    stock = forward(model, args)
    dit_attn.enable(model, SPARSE)
    assert same(stock, forward(model, args))
    summary = dit_attn.summary(model)
    assert summary.calls == 2 and summary.fallbacks == {UNSEEN: 2}
    assert "set a stock processor" in str(summary)


def test_a_global_name_that_is_replaced_later_is_the_one_that_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    model, args = wan_with(NamesNone)
    dit_attn.enable(model)
    forward(model, args)

    def other(query: Any, key: Any, value: Any, backend: Any = None) -> torch.Tensor:
        return torch.zeros_like(query)

    monkeypatch.setitem(NamesNone.__call__.__globals__, "dispatch_attention_fn", other)
    changed = forward(model, args)
    dit_attn.disable(model)
    assert same(changed, forward(model, args))
