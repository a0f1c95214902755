"""Install methods on a transformer and remove them: exactly what was there comes back, and refusals change nothing."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import dit_attn
from dit_attn.processors.attach import attach
from dit_attn.processors.attach.attention_processor import is_wrapped
from dit_attn.processors.attach.hooks import ContextHook, ForwardHook, GuidanceHook
from dit_attn.processors.core.clock import Clock
from tests._support.compose import SPARSE, forward, tiny

GUIDED = dit_attn.SoftPAG(heads="1:0")


def processors(model: torch.nn.Module) -> dict[str, Any]:
    """The processor of every layer that has one."""
    return {name: m.processor for name, m in model.named_modules() if hasattr(m, "processor")}


def ours(model: torch.nn.Module) -> list[str]:
    """The layers whose processor is wrapped."""
    return [name for name, processor in processors(model).items() if is_wrapped(processor)]


def hooks(model: torch.nn.Module) -> list[type]:
    """The types of the hooks on a transformer."""
    found = [*model._forward_pre_hooks.values(), *model._forward_hooks.values()]
    context = vars(model).get("cache_context")
    return [type(hook) for hook in (*found, *([context] if context is not None else []))]


WAN = ["blocks.0.attn1", "blocks.1.attn1"]

# -- install and remove -----------------------------------------------------------------------------------------------


def test_attach_wraps_the_layers_of_the_family_and_detach_restores_the_very_objects() -> None:
    model, _ = tiny("wan")
    stock, state, attributes = processors(model), model.state_dict(), set(vars(model))
    session = attach.attach(model, (SPARSE, GUIDED), Clock())
    assert session.installed and [layer.name for layer in session.layers] == WAN == ours(model)
    assert attach.session_of(model) is session and session.guider is not None and session.guider.method == GUIDED
    assert hooks(model) == [ForwardHook, GuidanceHook, ContextHook]
    assert list(model.state_dict()) == list(state)
    for _twice in range(2):
        attach.detach(model)
        assert all(processors(model)[name] is processor for name, processor in stock.items())
        assert hooks(model) == [] and attach.session_of(model) is None and set(vars(model)) == attributes
    assert session.guider.handle is None


def test_attaching_again_replaces_the_session_without_wrapping_twice() -> None:
    model, _ = tiny("wan")
    stock = processors(model)
    first = attach.attach(model, (GUIDED,), Clock())
    second = attach.attach(model, (SPARSE,), Clock())
    assert attach.session_of(model) is second is not first
    assert hooks(model) == [ForwardHook, ContextHook]
    wrapped = model.get_submodule(WAN[0]).processor
    assert wrapped.__dict__["_dit_stock"] is stock[f"{WAN[0]}"] and wrapped.__dict__["_dit_run"] is second


def test_watching_wraps_no_layer_and_sees_every_call() -> None:
    model, args = tiny("wan")
    attach.attach(model, (SPARSE,), Clock())
    clock = Clock()
    attach.watch(model, clock)
    session = attach.session_of(model)
    assert session is not None and ours(model) == [] and not session.installed and session.methods == ()
    forward(model, args)
    assert clock.run == 1 and ours(model) == []
    attach.detach(model)
    assert hooks(model) == []


def test_a_hook_of_other_code_stays() -> None:
    model, _ = tiny("wan")
    before = model.register_forward_pre_hook(lambda *_: None)
    behind = model.register_forward_hook(lambda *_: None)
    attach.attach(model, (GUIDED,), Clock())
    attach.detach(model)
    assert list(model._forward_pre_hooks) == [before.id] and list(model._forward_hooks) == [behind.id]
    assert not model._forward_pre_hooks_with_kwargs and not model._forward_hooks_with_kwargs


def test_the_guidance_hook_sits_behind_a_transformer_that_is_compiled_as_one_module() -> None:
    model, _ = tiny("wan")
    compiled: Any = torch.compile(model, backend="eager")
    pipe = Pipe(transformer=compiled, other=torch.nn.Linear(1, 1))
    attach.attach(model, (GUIDED,), Clock(), pipe)
    assert [type(hook) for hook in compiled._forward_hooks.values()] == [GuidanceHook]
    assert hooks(model) == [ForwardHook, ContextHook]
    attach.detach(model)
    assert not compiled._forward_hooks


class Pipe(SimpleNamespace):
    """A pipeline's components; sessions refer to it weakly."""


# -- refusals ---------------------------------------------------------------------------------------------------------


class CustomProcessor:
    """Linear attention: nothing to intercept."""

    def __call__(self, attn: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return hidden_states.cumsum(1)


def test_layers_without_softmax_attention_are_named_and_nothing_is_changed() -> None:
    model, _ = tiny("wan")
    custom = CustomProcessor()
    model.get_submodule(WAN[1]).processor = custom  # type: ignore[assignment]
    before = processors(model)
    with pytest.raises(
        dit_attn.DitAttnError, match=r"1 layers of WanTransformer3DModel .* \(CustomProcessor: blocks\.1\.attn1\)"
    ):
        attach.attach(model, (SPARSE,), Clock())
    assert processors(model) == before and hooks(model) == [] and attach.session_of(model) is None


@pytest.mark.parametrize(
    "method", [dit_attn.BlockSparse(dense_layers=(5,)), dit_attn.SoftPAG(heads="7:0")], ids=["dense layer", "head"]
)
def test_a_method_that_does_not_fit_leaves_the_session_that_is_there(method: Any) -> None:
    model, _ = tiny("wan")
    session = attach.attach(model, (SPARSE,), Clock())
    with pytest.raises(dit_attn.DitAttnError):
        attach.attach(model, (method,), Clock())
    assert attach.session_of(model) is session and ours(model) == WAN


# -- parts ------------------------------------------------------------------------------------------------------------


def test_a_transformer_is_found_behind_wrappers() -> None:
    model = torch.nn.Linear(1, 1)
    wrapper = type("DistributedDataParallel", (torch.nn.Module,), {})()
    wrapper.module = torch.compile(model, backend="eager")
    assert attach.unwrap(wrapper) is attach.unwrap(wrapper.module) is attach.unwrap(model) is model
    other = torch.nn.Module()
    other.module = model  # an attribute of this name is no wrapper
    assert attach.unwrap(other) is other


def test_processors_that_are_modules_keep_their_place_in_the_state_dict() -> None:
    layer = torch.nn.Module()
    layer.processor, layer.to_out = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    other = torch.nn.Linear(2, 2)
    names = list(layer.state_dict())
    attach.set_processor(layer, other)
    assert layer.processor is other and list(layer.state_dict()) == names
    attach.set_processor(layer, "plain")
    assert layer.processor == "plain" and list(layer.state_dict()) == ["to_out.weight", "to_out.bias"]
    attach.set_processor(layer, other)
    assert layer.processor is other and "processor" not in vars(layer)


def test_a_processor_that_other_code_replaces_is_wrapped_before_the_next_call() -> None:
    model, args = tiny("wan")
    plain = forward(model, args)
    session = attach.attach(model, (SPARSE,), Clock())
    sparse = forward(model, args)
    layer: Any = model.get_submodule(WAN[1])
    assert not torch.equal(plain, sparse)
    attach.set_processor(layer, type(attach.unwrap_processor(layer.processor))())
    assert ours(model) == WAN[:1]
    session.reset()
    assert torch.equal(forward(model, args), sparse) and ours(model) == WAN
    attach.set_processor(layer, CustomProcessor())  # nothing to intercept: it stays
    forward(model, args)
    assert ours(model) == WAN[:1]
    attach.detach(model)
    assert isinstance(layer.processor, CustomProcessor)


def test_processors_that_were_only_handed_out_are_wrapped_from_the_first_one_that_is_set() -> None:
    model, args = tiny("wan")
    session = attach.prepare(model, (SPARSE,), Clock())
    made = attach.session_processors(session)
    attach.install_hooks(session)
    assert list(made) == WAN and ours(model) == []
    forward(model, args)
    assert ours(model) == [] and not session.installed
    attach.set_processor(model.get_submodule(WAN[0]), made[WAN[0]])
    forward(model, args)
    forward(model, args)
    assert session.installed and ours(model) == WAN
    attach.detach(model)
    assert ours(model) == [] and hooks(model) == []


def test_processors_that_fusing_put_aside_are_restored_too() -> None:
    model, _ = tiny("wan")
    stock = processors(model)
    attach.attach(model, (SPARSE,), Clock())
    model.original_attn_processors = {f"{name}.processor": p for name, p in processors(model).items()}
    attach.detach(model)
    aside: Any = model.original_attn_processors
    assert all(aside[f"{name}.processor"] is processor for name, processor in stock.items())
