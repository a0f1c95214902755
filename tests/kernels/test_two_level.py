"""Pooled keys of two sizes in one softmax, and the covariance of the first-order term, by their definitions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dit_attn import DitAttnError
from dit_attn.kernels import BlockLayout, LogitBias, pooled_compensation, sparse_attention
from dit_attn.kernels.terms import key_value_covariance, pooled_bias
from dit_attn.kernels.two_level import FineLevel, two_level_attention

Q_LEN, KV_LEN = 70, 90


def parts(dtype: torch.dtype = torch.float64) -> tuple[tuple[torch.Tensor, ...], BlockLayout, BlockLayout]:
    """q, k, v; half of the blocks, and half of the others."""
    draw = torch.Generator().manual_seed(0)
    q = torch.randn(2, Q_LEN, 4, 16, generator=draw, dtype=dtype)
    k, v = (torch.randn(2, KV_LEN, 2, 16, generator=draw, dtype=dtype) for _ in range(2))
    scores = torch.rand(2, 4, 5, 6, generator=draw)
    scores[0, 0, 0] = 0.7  # a row without exact blocks
    sizes = (Q_LEN, KV_LEN, 16, 16)
    exact = BlockLayout.from_mask(scores < 0.5, *sizes)
    return (q, k, v), exact, BlockLayout.from_mask((scores >= 0.5) & (scores < 0.8), *sizes)


@pytest.mark.parametrize("biased", [False, True])
def test_one_softmax_over_exact_fine_and_coarse_keys(biased: bool) -> None:
    (q, k, v), exact, mid = parts()
    fine, coarse = (pooled_compensation(k, v, size) for size in (4, 8))
    bias, factors = None, {}
    if biased:
        draw = torch.Generator().manual_seed(1)
        bias = LogitBias(*(torch.randn(1, 4, n, 2, generator=draw, dtype=q.dtype) for n in (Q_LEN, KV_LEN)))
        factors = {pooled.tokens: pooled_bias(bias.k, pooled.tokens) for pooled in (fine, coarse)}
        fine, coarse = (replace(pooled, bias=factors[pooled.tokens]) for pooled in (fine, coarse))
    out, lse = two_level_attention(q, k, v, exact, FineLevel(mid, fine), coarse, bias=bias)
    row = torch.arange(Q_LEN) // 16
    logits, values = [], []
    rest = ~exact.block_mask() & ~mid.block_mask()
    for keys, means, weight, mask, block, factor in (
        (k.transpose(1, 2), v.transpose(1, 2), torch.zeros(KV_LEN), exact.block_mask(), 16, bias and bias.k),
        (fine.k, fine.v, fine.log_weight, mid.block_mask(), 4, factors.get(4)),
        (coarse.k, coarse.v, coarse.log_weight, rest, 2, factors.get(8)),
    ):
        column = torch.arange(keys.shape[2]) // block
        x = q.transpose(1, 2) @ keys.double().repeat_interleave(2, 1).mT * 0.25 + weight[..., None, :]
        if bias is not None and factor is not None:
            x = x + bias.q @ factor.double().mT
        logits.append(x.masked_fill(~mask[:, :, row][..., column], float("-inf")))
        values.append(means.double().repeat_interleave(2, 1))
    everything = torch.cat(logits, -1)
    expected = (torch.softmax(everything, -1) @ torch.cat(values, 2)).transpose(1, 2)
    torch.testing.assert_close(out.double(), expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(lse.double(), everything.logsumexp(-1), atol=1e-6, rtol=1e-6)


def test_the_same_size_twice_is_one_level_and_no_fine_block_changes_nothing() -> None:
    (q, k, v), exact, mid = parts(torch.float32)
    pooled = pooled_compensation(k, v, 8)
    whole = sparse_attention(q, k, v, exact, compensation=pooled)
    twice, _ = two_level_attention(q, k, v, exact, FineLevel(mid, pooled), pooled)
    torch.testing.assert_close(twice, whole, atol=2e-6, rtol=1e-5)
    none = BlockLayout.from_mask(torch.zeros(2, 4, 5, 6, dtype=torch.bool), Q_LEN, KV_LEN, 16, 16)
    same, _ = two_level_attention(q, k, v, exact, FineLevel(none, pooled), pooled)
    torch.testing.assert_close(same, whole, atol=1e-6, rtol=1e-6)
    assert FineLevel(mid, pooled).cost == pytest.approx(mid.density / 8)


def test_blocks_of_other_sizes_are_refused() -> None:
    (q, k, v), exact, mid = parts()
    with pytest.raises(DitAttnError, match=r"fine needs a layout of the call's sizes"):
        two_level_attention(q, k, v, exact, FineLevel(mid, pooled_compensation(k, v, 3)), pooled_compensation(k, v, 8))


def test_the_covariance_is_that_within_groups_of_keys_that_exist() -> None:
    (_, k, v), _, _ = parts()
    mask = torch.ones(2, KV_LEN, dtype=torch.bool)
    mask[1, 80:] = mask[1, 3:6] = False
    found = key_value_covariance(k, v, 8, key_mask=mask)
    for b in range(2):
        total = torch.zeros(16, 16, dtype=torch.float64)
        for low in range(0, KV_LEN, 8):
            at = torch.arange(low, min(low + 8, KV_LEN))
            at = at[mask[b, at]]
            if len(at):
                keys, values = k[b, at, 1], v[b, at, 1]
                total += (keys - keys.mean(0)).T @ (values - values.mean(0))
        torch.testing.assert_close(found[b, 1].double(), total / int(mask[b].sum()), atol=1e-6, rtol=1e-5)


def test_first_order_keys_and_values_are_recovered_where_logits_are_linear_and_alike() -> None:
    """With small logits and one covariance in all groups, the first-order term leaves an error of second order."""
    draw = torch.Generator().manual_seed(0)
    q = 0.05 * torch.randn(1, 32, 1, 16, generator=draw, dtype=torch.float64)
    spread = torch.randn(8, 16, generator=draw, dtype=torch.float64)
    spread = spread - spread.mean(0)
    centers = torch.randn(4, 1, 16, generator=draw, dtype=torch.float64)
    k = (centers + spread).reshape(1, 32, 1, 16)
    v = (torch.randn(4, 1, 16, generator=draw, dtype=torch.float64) + 3 * spread.flip(1)).reshape(1, 32, 1, 16)
    none = BlockLayout.from_mask(torch.zeros(1, 1, 4, 4, dtype=torch.bool), 32, 32, 8, 8)
    exact = torch.softmax(0.25 * q[0, :, 0] @ k[0, :, 0].T, -1) @ v[0, :, 0]
    errors = []
    for first_order in (None, key_value_covariance(k, v, 8)):
        pooled = replace(pooled_compensation(k, v, 8), first_order=first_order)
        out = sparse_attention(q, k, v, none, compensation=pooled)
        assert isinstance(out, torch.Tensor)
        errors.append(float((out[0, :, 0] - exact).norm()))
    assert errors[1] < 0.1 * errors[0]
