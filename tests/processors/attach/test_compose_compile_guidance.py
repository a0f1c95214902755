"""Compiling in place with guidance, processors that call torch's attention, and export."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import dit_attn
from dit_attn.processors.attach import attach
from tests._support.compose import SPARSE, forward, pipeline_run, same, tiny, tiny_pipeline

PAG = dit_attn.SoftPAG(heads="1", scale=2.0)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("order", ["compile-first", "enable-first"])
def test_guidance_runs_behind_a_transformer_that_is_compiled_in_place(order: str) -> None:
    pipe, kwargs = tiny_pipeline("wan")
    for parameter in pipe.transformer.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    stock = pipeline_run(pipe, kwargs, steps=2)
    dit_attn.enable(pipe, SPARSE, PAG)
    eager = pipeline_run(pipe, kwargs, steps=2)
    passes = dit_attn.summary(pipe).guidance
    dit_attn.disable(pipe)
    if order == "enable-first":
        dit_attn.enable(pipe, SPARSE, PAG)
    pipe.transformer.compile(fullgraph=True, backend="eager")
    if order == "compile-first":
        dit_attn.enable(pipe, SPARSE, PAG)
    torch.testing.assert_close(pipeline_run(pipe, kwargs, steps=2), eager, atol=1e-5, rtol=1e-5)
    found = dit_attn.summary(pipe).guidance
    assert passes is not None and found is not None and found.evaluations == passes.evaluations > 0
    twin = copy.deepcopy(pipe.transformer)
    session = attach.session_of(twin)
    assert session is not None and session.guider is not None and not session.guider.outside
    dit_attn.disable(pipe)
    assert "compile" not in vars(pipe.transformer) and pipe.transformer._compiled_call_impl is not None
    assert same(pipeline_run(pipe, kwargs, steps=2), stock)


def test_guidance_runs_behind_a_compiled_transformer_that_is_given_without_its_pipeline() -> None:
    pipe, kwargs = tiny_pipeline("wan")
    for parameter in pipe.transformer.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    dit_attn.enable(pipe, PAG)
    eager = pipeline_run(pipe, kwargs, steps=2)
    dit_attn.disable(pipe)
    stock = pipeline_run(pipe, kwargs, steps=2)
    pipe.transformer = torch.compile(pipe.transformer, fullgraph=True, backend="eager")
    dit_attn.enable(pipe.transformer, PAG)
    with dit_attn.enabled(pipe.transformer, SPARSE):
        pass
    torch.testing.assert_close(pipeline_run(pipe, kwargs, steps=2), eager, atol=1e-5, rtol=1e-5)
    dit_attn.disable(pipe.transformer)
    torch.testing.assert_close(pipeline_run(pipe, kwargs, steps=2), stock, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["cogview4", "easyanimate"])
def test_processors_that_call_torch_compile_to_one_graph(name: str) -> None:
    model, args = tiny(name)
    stock = forward(model, args)
    dit_attn.enable(model, SPARSE)
    eager = forward(model, args)
    sparse_calls = dit_attn.summary(model).sparse_calls
    dit_attn.enable(model, SPARSE)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert same(forward(compiled, args), eager) and not same(eager, stock)
    assert dit_attn.summary(model).sparse_calls == sparse_calls > 0


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_export_is_refused(strict: bool) -> None:
    class Exported(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.args = tiny("wan")

        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return self.model(**{**self.args, "hidden_states": hidden_states}, return_dict=False)[0]

    module = Exported()
    dit_attn.enable(module.model, SPARSE)
    refused = r"torch\.export would freeze .* call dit_attn\.disable"
    with torch.no_grad(), pytest.raises(Exception, match=refused) as error:
        torch.export.export(module, (module.args["hidden_states"],), strict=strict)
    assert strict or type(error.value) is dit_attn.DitAttnError


def test_the_name_of_an_outer_cache_context_is_known_again_after_an_inner_one() -> None:
    model: Any
    model, _ = tiny("wan")
    session = dit_attn.enable(model, SPARSE)
    seen = []
    with model.cache_context("cond"):
        with model.cache_context("uncond"):
            seen.append(session.context.name)
        seen.append(session.context.name)
    assert seen == ["uncond", "cond"] and session.context is None
