"""One graph for many densities, windows and steps: what makes the compiler start anew, and what does not."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from dit_attn.errors import DitAttnError
from dit_attn.kernels import BlockLayout, Epilogue, band, inward_window, pooled_compensation, sparse_attention
from dit_attn.kernels.selection.budget import blocks_of_density
from dit_attn.kernels.selection.select import plan_blocks, plan_scores

SHARES = (0.5, 0.3, 0.25, 0.1, 1.0, 0.07)
BACKENDS = ("eager", "aot_eager")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


Q, K, V = (random(1, 512, 2, 16, seed=seed) for seed in range(3))


def graphs(backend: str, function: Callable[..., torch.Tensor], calls: Iterable[tuple[Any, ...]]) -> int:
    """How many graphs the calls take, all of them right."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(function, backend=counter, fullgraph=True)
    for arguments in calls:
        torch.testing.assert_close(compiled(*arguments), function(*arguments))
    return counter.frame_count


def planned(name: str) -> Callable[[Any], torch.Tensor]:
    def attend(fraction: Any) -> torch.Tensor:
        layout = plan_blocks(Q, K, q_block=32, kv_block=32, **{name: fraction}).layout
        out = sparse_attention(Q, K, V, layout)
        assert isinstance(out, torch.Tensor)
        return out

    return attend


def attend(layout: BlockLayout) -> torch.Tensor:
    out = sparse_attention(Q, K, V, layout)
    assert isinstance(out, torch.Tensor)
    return out


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["density", "top_p"])
def test_a_budget_in_a_tensor_is_one_graph(name: str, backend: str) -> None:
    assert graphs(backend, planned(name), [(torch.tensor(fraction),) for fraction in SHARES]) == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_layout_of_another_density_costs_one_more_graph_at_most(backend: str) -> None:
    densities = (0.5, 0.3, 0.25, 0.1)
    layouts = [plan_blocks(Q, K, q_block=32, kv_block=32, density=density).layout for density in densities]
    assert graphs(backend, attend, [(layout,) for layout in layouts]) <= 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts_of_other_windows_cost_two_more_graphs_at_most(backend: str) -> None:
    windows = [inward_window((8, 8, 8), size, q_block=32, kv_block=32) for size in (3, 5, 7, 6, 2, (3, 4, 5))]
    assert graphs(backend, attend, [(layout,) for layout in windows]) <= 3  # its numbers, and the width of its lists
    bands = [band(512, 512, size, 2 * size, sinks=size // 10, q_block=32, kv_block=32) for size in (30, 50, 70, 40)]
    assert graphs(backend, attend, [(layout,) for layout in bands]) <= 3


def test_optional_terms_are_one_node_however_long_the_sequence() -> None:
    def attend(q: torch.Tensor, layout: BlockLayout, add: torch.Tensor) -> torch.Tensor:
        terms: dict[str, Any] = {"compensation": pooled_compensation(q, q, 16), "epilogue": Epilogue(add=add)}
        return sparse_attention(q, q, q, layout, **terms)  # type: ignore[return-value]

    sizes = []

    def count(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        sizes.append(len(graph.graph.nodes))
        return graph

    for length in (256, 2048):
        torch.compiler.reset()
        q, add = random(1, length, 2, 16), random(1, 2, length // 32, 16)
        compiled = torch.compile(attend, backend=count, fullgraph=True)
        for fraction in (0.5, 0.25, 0.375):
            layout = plan_blocks(q, q, q_block=32, kv_block=32, density=fraction).layout
            torch.testing.assert_close(compiled(q, layout, add), attend(q, layout, add))
    assert len(sizes) == 4 and sizes[0] == sizes[2]  # the second of each: the width of the lists is a variable


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_through_other_windows_cost_two_more_graphs_at_most(backend: str) -> None:
    q = Q[:, :64].clone().requires_grad_()

    def loss(layout: BlockLayout) -> torch.Tensor:
        out = sparse_attention(q, K[:, :64], V[:, :64], layout)
        assert isinstance(out, torch.Tensor)
        return out.square().sum()

    torch.compiler.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(loss, backend=counter, fullgraph=True)
    for size in (3, 5, 7, 6, 2):
        layout = inward_window((1, 8, 8), (1, size, size), q_block=16, kv_block=16)
        (found,), (expected,) = (torch.autograd.grad(function(layout), q) for function in (compiled, loss))
        torch.testing.assert_close(found, expected)
    assert counter.frame_count <= 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_tensor_keeps_as_many_blocks_as_the_number_does(dtype: torch.dtype) -> None:
    for blocks in (1, 7, 16, 100, 590, 1182, 8192):
        for hundredths in range(1, 101):
            fraction = hundredths / 100
            tensor = torch.tensor(fraction, dtype=dtype)
            assert int(blocks_of_density(tensor, blocks)) == blocks_of_density(fraction, blocks)


@pytest.mark.parametrize("with_forced", [False, True])
@pytest.mark.parametrize("name", ["density", "top_p"])
def test_a_budget_in_a_tensor_chooses_the_same_blocks(name: str, with_forced: bool) -> None:
    scores = random(1, 2, 5, 20)
    forced = torch.zeros(1, 1, 5, 20, dtype=torch.bool)
    forced[..., :3] = True
    common: Any = {
        "q_len": 80, "kv_len": 320, "q_block": 16, "kv_block": 16, "forced": forced if with_forced else None,
    }  # fmt: skip
    for fraction in SHARES:
        number = plan_scores(scores, **{name: fraction}, **common).layout
        tensor = plan_scores(scores, **{name: torch.tensor(fraction, dtype=torch.float64)}, **common).layout
        assert tensor.check() == number


@pytest.mark.parametrize("name", ["density", "top_p"])
@pytest.mark.parametrize(
    ("value", "why"),
    [
        (torch.tensor([0.5]), "must be 0-d float32 or float64"),
        (torch.tensor(1), "must be 0-d float32 or float64"),
        (torch.tensor(0.5, dtype=torch.float16), "must be 0-d float32 or float64"),
        (torch.tensor(0.0), r"in \(0, 1\], got 0"),
        (torch.tensor(1.5), r"in \(0, 1\], got 1.5"),
    ],
)
def test_a_tensor_that_is_no_share_is_refused(name: str, value: torch.Tensor, why: str) -> None:
    with pytest.raises(DitAttnError, match=why):
        plan_blocks(Q, K, q_block=32, kv_block=32, **{name: value})  # type: ignore[arg-type]
