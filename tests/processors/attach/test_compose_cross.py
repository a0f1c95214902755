"""Cross attention as a site: beside self attention, under CFG, torch.compile and sequence parallelism, in copies."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

import dit_attn
from dit_attn.processors.attach import attach
from dit_attn.processors.core.call import AttentionCall, Request
from dit_attn.processors.methods.base import Method
from tests._support.compose import SPARSE, case, forward, pipeline_run, same, tiny, tiny_pipeline
from tests._support.cross_mixin import Scaled, TextBiases
from tests.families import test_wan


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@dataclass(frozen=True)
class CondBias(Method):
    """Lift the first text tokens of one guidance branch."""

    sites: ClassVar[tuple[str, ...]] = ("text",)

    branch: str = "cond"

    def request(self, call: AttentionCall, request: Request) -> None:
        """Add the bias."""
        value = torch.tensor([[2.0 if branch == self.branch else 0.0] for branch in call.branches])
        request.add_span_bias(call, slice(None), slice(0, 3), value)


@pytest.mark.parametrize("name", ["wan", "pixart", "ltx"])
def test_self_attention_is_the_same_beside_a_method_for_cross_attention(name: str) -> None:
    model, args = tiny(name)
    dit_attn.enable(model, SPARSE)
    alone, expected = forward(model, args), dit_attn.summary(model)
    dit_attn.enable(model, TextBiases(0.0), SPARSE)
    assert same(alone, forward(model, args))
    found = dit_attn.summary(model)
    assert (found.calls, found.sparse_calls, found.density) == (expected.calls, expected.sparse_calls, expected.density)
    assert found.fallbacks == expected.fallbacks == {} and not expected.cross_layers
    assert {reason for layer in found.cross_layers for reason in layer.fallbacks} == {"nothing requested"}
    assert "cross attention" in str(found) and "cross attention" not in str(expected)
    dit_attn.enable(model, TextBiases(), SPARSE)
    assert not same(alone, forward(model, args))


@pytest.mark.parametrize("name, kind", [("wan", "cross"), ("pixart", "cross"), ("flux", "self")])
def test_the_text_is_where_the_family_attends_to_it(name: str, kind: str) -> None:
    model, args = tiny(name)
    session = dit_attn.enable(model, CondBias())
    forward(model, args)
    assert {layer.kind for layer in session.layers} == {kind}
    assert all(layer.stats.biased_calls == layer.stats.calls > 0 for layer in session.layers)


@pytest.mark.parametrize("name", ["pixart", "wan"], ids=["batched", "separate"])
def test_guidance_branches_are_biased_apart(name: str) -> None:
    pipe, kwargs = tiny_pipeline(name)
    biased: dict[str, set[bool]] = {"cond": set(), "uncond": set()}

    def observe(call: Any, request: Any, out: torch.Tensor) -> None:
        bias = request.bias(slice(0, call.q.shape[1]))
        for row, branch in enumerate(call.branches):
            part = None if bias is None else (bias.q @ bias.k.mT).expand(len(call.branches), -1, -1, -1)[row]
            biased[branch].add(part is not None and bool(part.any()))

    dit_attn.enable(pipe, CondBias())
    with dit_attn.observing(pipe, observe, ("cross",)):
        pipeline_run(pipe, kwargs, steps=2)
    assert biased == {"cond": {True}, "uncond": {False}}


@pytest.mark.parametrize("name", ["wan", "pixart", "image-to-video"])
def test_compiled_cross_attention_is_that_of_eager_with_one_graph(name: str) -> None:
    made = test_wan.TestWanImageToVideo() if name == "image-to-video" else case(name)
    torch.manual_seed(0)
    model, args = made.model().eval(), made.inputs()
    dit_attn.enable(model, TextBiases(), Scaled())
    eager = forward(model, args)
    compiled: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert same(eager, forward(compiled, args))
    layers = dit_attn.summary(model).cross_layers
    assert all(layer.biased_calls * len(made.cross_calls) == layer.calls > 0 for layer in layers)
    assert len(layers) == made.cross_sockets
    assert all(layer.scaled_calls == layer.calls > 0 for layer in dit_attn.summary(model).layers)


def test_a_copied_model_keeps_its_cross_attention_sites() -> None:
    model, args = tiny("wan")
    dit_attn.enable(model, TextBiases(), SPARSE)
    expected = forward(model, args)
    twin = copy.deepcopy(model)
    assert same(expected, forward(twin, args))
    session: Any = attach.session_of(twin)
    found = [(layer.kind, layer.index) for layer in session.layers]
    assert found == [("self", 0), ("self", 1), ("cross", 0), ("cross", 1)]
    dit_attn.disable(twin)
    assert same(expected, forward(model, args))


def test_guidance_addresses_self_attention_alone() -> None:
    model, args = tiny("wan")
    session = dit_attn.enable(model, dit_attn.SoftPAG(), TextBiases())
    assert session.guider is not None and set(session.guider.plan.strengths) <= {"blocks.0.attn1", "blocks.1.attn1"}
    forward(model, args)


def test_unknown_sites_and_observers_of_what_is_not_there_are_refused_in_one_line() -> None:
    @dataclass(frozen=True)
    class Astray(Method):
        sites: ClassVar[tuple[str, ...]] = ("everywhere",)

    wan, _ = tiny("wan")
    with pytest.raises(dit_attn.DitAttnError, match="Astray: sites must be a tuple of self, cross, image, text"):
        dit_attn.enable(wan, Astray())
    flux, _ = tiny("flux")
    dit_attn.enable(flux)
    refused = pytest.raises(dit_attn.DitAttnError, match="the observer needs cross attention")
    with refused, dit_attn.observing(flux, print, ("cross",)):
        pass
    assert not attach.session_of(flux).observers  # type: ignore[union-attr]
