"""The Triton kernels on a GPU, at sizes the interpreter cannot reach. Skipped where there is none."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dit_attn.kernels import BlockLayout, block_scores, choose_backend, inward_window, select_blocks, sparse_attention
from dit_attn.kernels.problem import Problem
from dit_attn.kernels.selection.select import plan_blocks
from dit_attn.kernels.terms import NO_TERMS, Epilogue, Terms, pooled_compensation
from tests.kernels.test_terms import attend

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


def call(seq: int = 4200, dim: int = 128, dtype: torch.dtype = torch.bfloat16, density: float = 0.2) -> Problem:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, seq, 4, dim, device="cuda").to(dtype) for _ in range(3))
    blocks = -(-seq // 128)
    scores = torch.randn(2, 4, blocks, blocks, device="cuda")
    layout = select_blocks(scores, density=density, q_len=seq, kv_len=seq, q_block=128, kv_block=128)
    return Problem(q, k, v, layout, dim**-0.5, None, None)


def near(p: Problem, terms: Terms = NO_TERMS, backend: str | None = None) -> None:
    """As close to the fp32 gather path as the type allows."""
    wide = replace(p, q=p.q.float(), k=p.k.float(), v=p.v.float())
    expected = attend(wide, terms, "gather")
    out, lse = attend(p, terms, backend)
    assert (out.float() - expected[0]).norm() < 6e-3 * expected[0].norm()
    torch.testing.assert_close(lse, expected[1], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("dim", (64, 72, 96, 128))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32))
def test_triton_is_chosen_and_right(dim: int, dtype: torch.dtype) -> None:
    p = call(dim=dim, dtype=dtype)
    assert choose_backend(p.q, p.layout).backend == "triton"
    near(p)


def test_descriptors_give_the_same() -> None:
    near(call(), backend="triton-tma")


def test_windows_terms_and_heads_first() -> None:
    p = call(4096)
    near(replace(p, layout=inward_window((16, 16, 16), (7, 9, 9), device="cuda")))
    blend = Epilogue(blend=torch.tensor([[0.0, 0.3, 1.0, 0.7]], device="cuda"))
    near(p, Terms(compensation=pooled_compensation(p.k, p.v, 16, variance=True), epilogue=blend))
    turned = [x.transpose(1, 2).contiguous() for x in (p.q, p.k, p.v)]
    out = sparse_attention(*turned, p.layout, tensor_layout="bhsd")
    assert torch.equal(out.transpose(1, 2), sparse_attention(p.q, p.k, p.v, p.layout))  # type: ignore[union-attr]


def test_gradients_agree_and_repeat_exactly() -> None:
    p = call(2100, dtype=torch.bfloat16)
    results = []
    for dtype, backend in ((torch.bfloat16, "triton"), (torch.bfloat16, "triton"), (torch.float32, "gather")):
        q, k, v = (x.detach().to(dtype).requires_grad_() for x in (p.q, p.k, p.v))
        out = sparse_attention(q, k, v, p.layout, backend=backend)
        torch.manual_seed(1)
        results.append(torch.autograd.grad(out, (q, k, v), torch.randn_like(out.float()).to(dtype)))  # type: ignore
    for first, again, exact in zip(*results):
        assert torch.equal(first, again)
        assert (first.float() - exact).norm() < 2e-2 * exact.norm()


def test_the_fused_selection_chooses_the_same_blocks() -> None:
    p = call()
    for budget in ({"density": 0.2}, {"top_p": 0.8}):
        fused, plain = (
            plan_blocks(p.q, p.k, q_block=128, kv_block=128, backend=name, **budget).layout.block_mask()  # type: ignore
            for name in ("triton", "torch")
        )
        assert (fused != plain).float().mean() < 1e-3  # scores that differ in their last bit only


def test_one_graph_for_every_density_and_a_cuda_graph() -> None:
    p = call(2048)

    def run(q: torch.Tensor, layout: BlockLayout) -> torch.Tensor:
        return sparse_attention(q, p.k, p.v, layout) * 1.0  # type: ignore[operator]

    compiled = torch.compile(run, fullgraph=True)
    for density in (0.2, 0.4):
        layout = select_blocks(
            block_scores(p.q, p.k, 128, 128), density=density, q_len=2048, kv_len=2048, q_block=128, kv_block=128
        )
        torch.testing.assert_close(compiled(p.q, layout), run(p.q, layout))
    graph, expected = torch.cuda.CUDAGraph(), run(p.q, p.layout)
    with torch.cuda.graph(graph):
        captured = run(p.q, p.layout)
    graph.replay()
    assert torch.equal(captured, expected)
