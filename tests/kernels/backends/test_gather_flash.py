"""The backend that runs torch's CPU flash attention on gathered key blocks, against the formulas in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dit_attn.errors import DitAttnError
from dit_attn.kernels import BlockLayout, inward_window, sparse_attention
from dit_attn.kernels.backends.reference import reference_attention

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.float64: 1e-10}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("altered", (False, True))
def test_it_agrees_with_the_formulas(dtype: torch.dtype, altered: bool) -> None:
    """Ragged lengths, grouped heads, different counts, rows without blocks and rows whose keys are all masked."""
    rng = torch.Generator().manual_seed(0)
    q = torch.randn(2, 70, 4, 16, generator=rng).to(dtype)
    k, v = (torch.randn(2, 90, 2, 16, generator=rng).to(dtype) for _ in range(2))
    blocks = torch.rand(2, 4, 5, 6, generator=rng) < 0.5
    blocks[0, 1, 2], blocks[1, :, 0], blocks[1, :, 0, 0] = False, False, True
    layout = BlockLayout.from_mask(blocks, 70, 90, 16, 16)
    terms: dict[str, Any] = {}
    if altered:
        mask = torch.rand(2, 90, generator=rng) < 0.8
        mask[1, :16] = False
        terms = {"key_mask": mask, "key_bias": torch.randn(2, 4, 90, generator=rng)}
    out, lse = sparse_attention(q, k, v, layout, return_lse=True, backend="gather-sdpa", **terms)
    good, good_lse = reference_attention(q.double(), k.double(), v.double(), layout, scale=0.25, **{
        "key_mask": None, "key_bias": None, **terms})  # fmt: skip
    torch.testing.assert_close(out.double(), good, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    lse_tolerance = min(1e-3, TOLERANCE[dtype])
    torch.testing.assert_close(lse.double(), good_lse, rtol=lse_tolerance, atol=lse_tolerance)
    assert bool((out[0, 32:48, 1] == 0).all()) and bool((lse[0, 1, 32:48] == -torch.inf).all())


def test_gradients_are_those_of_gather() -> None:
    q, k, v = (torch.randn(1, 40, 2, 8, requires_grad=True) for _ in range(3))
    layout = BlockLayout.from_mask(torch.rand(1, 2, 3, 3) < 0.7, 40, 40, 16, 16)
    found, expected = (
        torch.autograd.grad(sparse_attention(q, k, v, layout, backend=name).square().sum(), (q, k, v))  # type: ignore
        for name in ("gather-sdpa", "gather")
    )
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_what_it_cannot_run_is_refused_with_the_reason() -> None:
    x = torch.randn(1, 64, 2, 8)
    with pytest.raises(DitAttnError, match="element masks"):
        sparse_attention(x, x, x, inward_window((8, 8), (3, 3), q_block=16, kv_block=16), backend="gather-sdpa")
    with pytest.raises(DitAttnError, match="head size"):
        sparse_attention(x, x, x[..., :4], BlockLayout.dense(64, 64, 16, 16), backend="gather-sdpa")
