"""torch.compile: one graph, the same graphs as stock, the same numbers as eager, and decisions that stay alive."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import dit_attn
from tests._support.compose import SPARSE, WARM, forward, pipeline_run, same, tiny, tiny_pipeline
from tests._support.span_biases import HeadBiases

STEP = {"wan": torch.tensor([300, 300]), "ltx": torch.tensor([300, 300]), "flux": torch.tensor([0.3, 0.3])}


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def counting() -> Any:
    """A backend that counts graphs and runs them exactly."""
    return CompileCounterWithBackend("aot_eager")


@pytest.mark.parametrize("name", ["wan", "flux", "ltx"])
def test_one_full_graph_serves_every_step_layer_and_method(name: str) -> None:
    model, args = tiny(name)
    stock = forward(model, args)
    counter = counting()
    compiled: Any = torch.compile(model, fullgraph=True, backend=counter)
    dit_attn.enable(model)
    assert same(stock, forward(compiled, args))
    graphs = counter.frame_count
    assert graphs <= 2  # the model, and the forward hook that reads its arguments
    assert dit_attn.summary(compiled).calls == dit_attn.summary(model).calls > 0
    for method in (SPARSE, WARM):
        session = dit_attn.enable(compiled, method)
        first, second = forward(compiled, args), forward(compiled, args, timestep=STEP[name])
        summary = dit_attn.summary(compiled)
        assert (session.clock.step, session.clock.run) == (1, 1)
        sparse_calls = {SPARSE: 2, WARM: 1}[method] * len(session.layers)
        assert (summary.calls, summary.sparse_calls) == (2 * len(session.layers), sparse_calls)
        dit_attn.enable(model, method)
        assert same(first, forward(model, args))
        assert same(second, forward(model, args, timestep=STEP[name]))
        assert same(first, stock) == (method is WARM)
    assert counter.frame_count == graphs
    dit_attn.disable(compiled)
    assert same(stock, forward(compiled, args))


@pytest.mark.parametrize("name", ["wan", "flux", "ltx"])
def test_repeated_blocks_compile_to_as_many_graphs_as_stock(name: str) -> None:
    graphs = []
    for ours in (False, True):
        torch._dynamo.reset()
        model, args = tiny(name)
        counter = counting()
        if ours:
            dit_attn.enable(model, SPARSE)
            eager = forward(model, args)
        model.compile_repeated_blocks(fullgraph=True, backend=counter)  # type: ignore[operator]
        first = forward(model, args)
        if ours:
            assert same(first, eager)
            before = counter.frame_count
            dit_attn.enable(model, WARM)
            forward(model, args)
            forward(model, args, timestep=STEP[name])
            summary = dit_attn.summary(model)
            assert summary.calls == 2 * len(summary.layers) and summary.sparse_calls == len(summary.layers)
            assert counter.frame_count == before
        graphs.append(counter.frame_count)
    assert graphs[0] == graphs[1]


PER_HEAD = dit_attn.BlockSparse(density=(0.2, 0.7), q_block=32, kv_block=32, dense_steps=0)


@pytest.mark.parametrize(
    "name, methods", [("flux", (HeadBiases(),)), ("wan", (HeadBiases(), PER_HEAD))], ids=["dense", "sparse"]
)
def test_biases_and_budgets_of_heads_need_no_graph_of_their_own(name: str, methods: Any) -> None:
    model, args = tiny(name)
    stock = forward(model, args)
    dit_attn.enable(model, *methods)
    eager = forward(model, args)
    counter = counting()
    compiled: Any = torch.compile(model, fullgraph=True, backend=counter)
    assert same(eager, forward(compiled, args)) and not same(eager, stock)
    summary, graphs = dit_attn.summary(model), counter.frame_count
    assert sum(layer.biased_calls for layer in summary.layers) == summary.calls and graphs <= 2
    dit_attn.enable(compiled, HeadBiases(0.5), *methods[1:])
    assert not same(eager, forward(compiled, args))
    dit_attn.enable(compiled)
    assert same(stock, forward(compiled, args)) and counter.frame_count == graphs


def test_a_guided_run_with_biases_and_a_layout_is_that_of_eager() -> None:
    methods = (dit_attn.SoftPAG(scale=2.0, u=0.8), HeadBiases(), PER_HEAD)
    pipe, kwargs = tiny_pipeline("wan")
    dit_attn.enable(pipe, *methods[1:])
    unguided = pipeline_run(pipe, kwargs)
    dit_attn.enable(pipe, *methods)
    eager = pipeline_run(pipe, kwargs)
    counter = counting()
    pipe.transformer = torch.compile(pipe.transformer, backend=counter, fullgraph=True)
    dit_attn.enable(pipe, *methods)
    assert same(eager, pipeline_run(pipe, kwargs)) and not same(eager, unguided)
    assert 0 < counter.frame_count <= 2


@pytest.mark.parametrize("name", ["pixart", "cosmos25"])  # cosmos25 names no backend to diffusers
def test_legacy_processors_compile_too(name: str) -> None:
    model, args = tiny(name)
    dit_attn.enable(model, SPARSE)
    eager = forward(model, args)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert same(eager, forward(compiled, args))
    assert dit_attn.summary(model).sparse_calls > 0


@pytest.mark.skipif(shutil.which("gcc") is None, reason="inductor needs a C++ compiler")
def test_inductor_agrees_with_eager() -> None:
    model, args = tiny("wan")
    dit_attn.enable(model, SPARSE)
    eager = forward(model, args)
    model.compile_repeated_blocks(fullgraph=True)  # type: ignore[operator]
    torch.testing.assert_close(forward(model, args), eager, atol=1e-5, rtol=1e-4)
    assert dit_attn.summary(model).sparse_calls > 0


def test_training_inside_compile_is_refused_with_one_error() -> None:
    model, args = tiny("wan")
    dit_attn.enable(model, SPARSE)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with pytest.raises(dit_attn.DitAttnError, match=r"cannot be trained inside torch\.compile"):
        compiled(**args, return_dict=False)
