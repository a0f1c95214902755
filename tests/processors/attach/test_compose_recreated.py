"""Processors that other code makes anew, sets or moves while methods are enabled, and copies of guided models."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor, FluxIPAdapterAttnProcessor
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

import dit_attn
from dit_attn.processors.attach import attach
from dit_attn.processors.attach.attention_processor import is_wrapped, tap_of, wrapped_by
from tests._support.compose import SPARSE, forward, pipeline_run, same, tiny, tiny_pipeline


def ip_adapter(model: Any) -> list[dict[str, Any]]:
    """Random weights of a small IP-Adapter, as its file has them."""
    torch.manual_seed(2)
    inner, context = model.inner_dim, model.config.joint_attention_dim
    projection = {
        "proj.weight": torch.randn(4 * context, 8),
        "proj.bias": torch.zeros(4 * context),
        "norm.weight": torch.ones(context),
        "norm.bias": torch.zeros(context),
    }
    layers: dict[str, torch.Tensor] = {}
    for index in range(len(model.transformer_blocks)):
        for name in ("to_k", "to_v"):
            layers[f"{index}.{name}_ip.weight"] = torch.randn(inner, context) * 0.1
            layers[f"{index}.{name}_ip.bias"] = torch.zeros(inner)
    return [{"image_proj": projection, "ip_adapter": layers}]


def with_adapter(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    return forward(model, inputs, joint_attention_kwargs={"ip_adapter_image_embeds": [torch.ones(1, 1, 8)]})


def wrapped_layers(model: Any) -> int:
    return sum(is_wrapped(getattr(module, "processor", None)) for module in model.modules())


# -- made by processor.__class__() -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["flux", "wan", "pixart", "sd3"])
def test_calling_the_class_of_a_wrapped_processor_makes_a_stock_one(name: str) -> None:
    model, _ = tiny(name)
    stock = {type(module.processor) for module in model.modules() if hasattr(module, "processor")}
    session = dit_attn.enable(model, SPARSE)
    kinds = [type(session.module(layer).processor) for layer in session.layers]
    assert all(type(kind()) in stock for kind in kinds)


@pytest.mark.parametrize("methods", [(), (SPARSE,)], ids=["no-method", "sparse"])
def test_an_adapter_that_is_loaded_while_enabled_runs_as_if_loaded_before(methods: tuple[Any, ...]) -> None:
    model, inputs = tiny("flux")
    model._load_ip_adapter_weights(ip_adapter(model), low_cpu_mem_usage=False)
    stock = with_adapter(model, inputs)
    dit_attn.enable(model, *methods)
    expected = with_adapter(model, inputs)
    sparse_calls = dit_attn.summary(model).sparse_calls
    assert same(stock, expected) == (not methods) == (not sparse_calls)

    late, inputs = tiny("flux")
    dit_attn.enable(late, *methods)
    late._load_ip_adapter_weights(ip_adapter(late), low_cpu_mem_usage=False)
    assert same(expected, with_adapter(late, inputs))
    assert dit_attn.summary(late).sparse_calls == sparse_calls
    dit_attn.enable(late, *methods)
    assert same(expected, with_adapter(late, inputs))
    dit_attn.disable(late)
    assert not wrapped_layers(late) and same(stock, with_adapter(late, inputs))


def test_an_adapter_that_is_unloaded_while_enabled_leaves_the_model_without_it() -> None:
    model, inputs = tiny("flux")
    plain = forward(model, inputs)
    dit_attn.enable(model, SPARSE)
    sparse = forward(model, inputs)
    dit_attn.disable(model)
    model._load_ip_adapter_weights(ip_adapter(model), low_cpu_mem_usage=False)
    dit_attn.enable(model, SPARSE)
    with_adapter(model, inputs)
    assert any(isinstance(p, FluxIPAdapterAttnProcessor) for p in model.attn_processors.values())
    model.set_attn_processor({name: FluxAttnProcessor() for name in model.attn_processors})
    model.encoder_hid_proj = None
    assert same(sparse, forward(model, inputs))
    dit_attn.disable(model)
    assert same(plain, forward(model, inputs))


# -- set by the user -------------------------------------------------------------------------------------------------


class Zero:
    """A processor of a user, without attention."""

    def __call__(self, attn: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.zeros_like(hidden_states)


def test_a_processor_set_while_enabled_runs_as_if_set_before_and_is_reported() -> None:
    model, inputs = tiny("pixart")
    dit_attn.enable(model, SPARSE)
    expected = forward(model, inputs)
    before = dit_attn.summary(model).warnings  # of a bare transformer
    model.set_attn_processor(AttnProcessor2_0())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(expected, forward(model, inputs)) and same(expected, forward(model, inputs))
    report = dit_attn.summary(model)
    (added,) = set(report.warnings) - set(before)
    assert report.sparse_calls and "AttnProcessor2_0, set since enable: the methods apply to it" in added
    dit_attn.disable(model)
    assert {type(p) for p in model.attn_processors.values()} == {AttnProcessor2_0}


def test_a_processor_without_attention_set_while_enabled_runs_untouched_and_is_warned_about() -> None:
    model, inputs = tiny("wan")
    model.set_attn_processor(Zero())
    plain = forward(model, inputs)
    model.set_attn_processor(WanAttnProcessor())
    dit_attn.enable(model, SPARSE)
    forward(model, inputs)
    before = dit_attn.summary(model).warnings
    model.set_attn_processor(Zero())
    assert tap_of(Zero()) is None
    with pytest.warns(UserWarning, match="runs Zero, set since enable: no method applies, .* set the stock") as caught:
        assert same(plain, forward(model, inputs)) and same(plain, forward(model, inputs))
    assert len(caught) == 1
    (added,) = set(dit_attn.summary(model).warnings) - set(before)
    assert "no method applies, it has no softmax attention to tap; set the stock processor again" in added
    dit_attn.disable(model)
    assert same(plain, forward(model, inputs))


def test_processors_stored_while_enabled_run_stock_attention_after_disable() -> None:
    for name in ("wan", "pixart"):  # one of each tap
        model, inputs = tiny(name)
        plain = forward(model, inputs)
        dit_attn.enable(model, SPARSE)
        sparse, stored = forward(model, inputs), dict(model.attn_processors)
        dit_attn.disable(model)
        model.set_attn_processor(dict(stored))
        assert wrapped_layers(model) and same(plain, forward(model, inputs))
        dit_attn.enable(model, SPARSE)
        assert same(sparse, forward(model, inputs))
        dit_attn.disable(model)
        assert not wrapped_layers(model) and same(plain, forward(model, inputs))


def test_processors_stored_while_another_session_was_enabled_join_the_one_that_is() -> None:
    model, inputs = tiny("wan")
    dit_attn.enable(model, dit_attn.BlockSparse(density=1.0))
    stored = dict(model.attn_processors)
    session = dit_attn.enable(model, SPARSE)
    expected = forward(model, inputs)
    model.set_attn_processor(stored)
    assert same(expected, forward(model, inputs))
    assert all(wrapped_by(session.module(layer).processor) is session for layer in session.layers)


def test_processors_of_one_model_set_on_another_run_stock_attention_there() -> None:
    for name in ("wan", "pixart"):
        (model, inputs), (other, _) = tiny(name), tiny(name)
        plain = forward(model, inputs)
        session = dit_attn.enable(model, SPARSE)
        forward(model, inputs)
        calls = dit_attn.summary(model).calls
        other.set_attn_processor(dict(model.attn_processors))
        assert same(plain, forward(other, inputs))
        assert dit_attn.summary(model).calls == calls and attach.session_of(model) is session
        dit_attn.disable(other)
        assert not wrapped_layers(other)


# -- copies ----------------------------------------------------------------------------------------------------------

GUIDED = [
    dit_attn.SoftPAG(heads="1", scale=2.0),
    dit_attn.SEG(scale=2.0),
    dit_attn.SLG(scale=2.0, start=0.0, stop=1.0),
    dit_attn.STG(scale=2.0),
]


@pytest.mark.parametrize("name", ["wan", "flux"])
@pytest.mark.parametrize("method", GUIDED, ids=[method.slug for method in GUIDED])
def test_a_copy_of_a_guided_pipeline_is_guided_by_itself(name: str, method: Any) -> None:
    pipe, kwargs = tiny_pipeline(name)
    with torch.no_grad():
        plain = pipeline_run(pipe, kwargs, steps=2)
        session = dit_attn.enable(pipe, method)
        clone = copy.deepcopy(pipe)
        clone.set_progress_bar_config(disable=True)
        other = attach.session_of(clone.transformer)
        assert other is not None and other.guider is not None and other.guider.session is other
        guided = pipeline_run(pipe, kwargs, steps=2)
        dit_attn.disable(pipe)
        assert not same(plain, guided) and same(guided, pipeline_run(clone, kwargs, steps=2))
        assert same(plain, pipeline_run(pipe, kwargs, steps=2))
    assert session.clock.run == other.clock.run == 1
    assert dit_attn.summary(clone).guidance is not None


@pytest.mark.parametrize("method", GUIDED, ids=[method.slug for method in GUIDED])
def test_a_copy_of_a_guided_transformer_is_guided_by_itself(method: Any) -> None:
    model, inputs = tiny("wan")
    dit_attn.enable(model, method)
    clone = copy.deepcopy(copy.deepcopy(model))
    assert same(forward(model, inputs), forward(clone, inputs))
    dit_attn.disable(clone)
    assert not wrapped_layers(clone) and attach.session_of(model) is not None
