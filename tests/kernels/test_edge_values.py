"""Values at the edge of what is allowed: scale 0, rows without keys under gradients, NaN in skipped blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dit_attn.kernels import BlockLayout, Compensation, LogitBias, pooled_compensation, sparse_attention

BACKENDS = ["gather", "gather-sdpa", "reference", None]


def random_call(s: int, d: int, kv_block: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(1, s, 1, d, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kv_block, d", [(1, 160), (16, 64)])
def test_scale_0_is_the_mean_of_the_attended_values_whatever_ran_before(
    dtype: torch.dtype, backend: str | None, kv_block: int, d: int
) -> None:
    q, k, v = random_call(64, d, kv_block, dtype)
    mask = torch.rand(1, 1, 4, 64 // kv_block, generator=torch.Generator().manual_seed(9)) < 0.3
    mask[..., 0] = True
    layout = BlockLayout.from_mask(mask, 64, 64, 16, kv_block)
    outs = []
    for size in (1.0, 8.0):  # fills the working memory of this thread with other logits
        sparse_attention(q * size, k * size, v, layout, scale=1.0, backend=backend)
        outs.append(sparse_attention(q, k, v, layout, scale=0, backend=backend))
    allowed = layout.materialize()[0, 0].double()
    exact = (allowed / allowed.sum(-1, keepdim=True)) @ v[0, :, 0].double()
    assert torch.equal(outs[0], outs[1])
    rtol, atol = (1e-2, 4e-3) if dtype == torch.bfloat16 else (1e-5, 1e-6)
    torch.testing.assert_close(outs[0][0, :, 0].double(), exact, rtol=rtol, atol=atol)


@pytest.mark.parametrize("backend", ["gather", "reference", None])  # those with a low-rank bias
def test_scale_0_keeps_bias_and_compensation_and_has_gradients(backend: str | None) -> None:
    q, k, v = (x.requires_grad_() for x in random_call(32, 16, 8, torch.float64))
    mask = torch.eye(4, dtype=torch.bool)[None, None]
    layout = BlockLayout.from_mask(mask, 32, 32, 8, 8)
    bias = LogitBias(torch.ones(1, 1, 32, 1, dtype=torch.float64), torch.randn(1, 1, 32, 1, dtype=torch.float64))
    comp = pooled_compensation(k.detach(), v.detach(), 4)
    terms: dict[str, Any] = {"bias": bias, "compensation": comp}
    out = sparse_attention(q, k, v, layout, scale=0.0, backend=backend, **terms)
    exact = sparse_attention(q.detach() * 0, k.detach(), v.detach(), layout, scale=1.0, backend="reference", **terms)
    torch.testing.assert_close(out, exact, rtol=1e-6, atol=1e-7)
    dq, dk, dv = torch.autograd.grad(out.square().sum(), (q, k, v))
    assert not dq.any() and not dk.any() and dv.isfinite().all() and dv.any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pooled", [False, True])
def test_a_sample_without_keys_gives_zeros_and_finite_gradients(backend: str | None, pooled: bool) -> None:
    q, k, v = (torch.randn(2, 8, 1, 16, requires_grad=True) for _ in range(3))
    layout = BlockLayout.dense(8, 8, 4, 4)  # every block is attended to, so no pooled key counts
    comp: Compensation | None = pooled_compensation(k.detach(), v.detach(), 4) if pooled else None
    lengths = torch.tensor([8, 0], dtype=torch.int32)
    out, lse = sparse_attention(
        q, k, v, layout, key_lengths=lengths, compensation=comp, return_lse=True, backend=backend
    )
    assert not out[1].any() and (lse[1] == float("-inf")).all()
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(x.isfinite().all() and not x[1].any() for x in grads) and grads[2][0].any()
    alone = [x.detach()[:1].requires_grad_() for x in (q, k, v)]
    expected = torch.autograd.grad(sparse_attention(*alone, layout, backend=backend).sum(), alone)  # type: ignore
    for found, exact in zip(grads, expected):
        torch.testing.assert_close(found[:1], exact)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_rows_that_skip_a_block_get_nothing_of_it(backend: str | None, bad: float) -> None:
    q, k, v = random_call(16, 16, 8)
    mask = torch.tensor([[[[1, 0], [1, 1]]]], dtype=torch.bool)
    layout = BlockLayout.from_mask(mask, 16, 16, 8, 8)
    expected = sparse_attention(q, k, v, layout, backend=backend)
    k, v = k.clone(), v.clone()
    k[:, 8:] = v[:, 8:] = bad  # queries 0 to 7 do not attend to it
    q.requires_grad_()
    out = sparse_attention(q, k, v, layout, backend=backend)
    assert isinstance(out, torch.Tensor) and isinstance(expected, torch.Tensor)
    torch.testing.assert_close(out[:, :8], expected[:, :8])
    (grad,) = torch.autograd.grad(out[:, :8].sum(), q)
    assert grad[:, :8].isfinite().all() and grad[:, :8].any()
