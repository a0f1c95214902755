"""Entmax against its definition, attention to the text in chunks, and the extrapolated step."""

from __future__ import annotations

import math

import pytest
import torch

from dit_attn.kernels import LogitBias
from dit_attn.processors.guidance import sparse_text
from dit_attn.processors.guidance.sparse_text import attend_to_text, entmax, extrapolated


def by_bisection(z: torch.Tensor, alpha: float) -> torch.Tensor:
    """The weights ``[(alpha - 1) z - tau]_+ ** (1 / (alpha - 1))`` whose sum is 1, tau by bisection."""
    z = z * (alpha - 1.0)
    low, high = z.amax(-1, keepdim=True) - 1.0, z.amax(-1, keepdim=True)
    for _ in range(80):
        tau = (low + high) / 2
        total = (z - tau).clamp(min=0.0).pow(1.0 / (alpha - 1.0)).sum(-1, keepdim=True)
        low, high = torch.where(total > 1.0, tau, low), torch.where(total > 1.0, high, tau)
    return (z - low).clamp(min=0.0).pow(1.0 / (alpha - 1.0))


@pytest.mark.parametrize("alpha", [1.5, 2.0])
@pytest.mark.parametrize("spread", [0.1, 1.0, 30.0])
def test_entmax_is_its_definition(alpha: float, spread: float) -> None:
    z = torch.randn(5, 7, 23, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * spread
    found = entmax(z, alpha)
    torch.testing.assert_close(found, by_bisection(z, alpha), atol=1e-9, rtol=0)
    torch.testing.assert_close(found.sum(-1), torch.ones(5, 7, dtype=torch.float64))
    assert (found == 0).any() or spread == 0.1


def test_equal_logits_share_and_shifts_change_nothing() -> None:
    z = torch.tensor([[3.0, 3.0, 3.0, -math.inf], [1.0, 0.2, -0.5, 0.1]], dtype=torch.float64)
    assert entmax(z)[0].tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0.0])
    torch.testing.assert_close(entmax(z + 500.0), entmax(z))


def test_keys_that_are_not_there_weigh_nothing_and_rows_without_keys_are_empty() -> None:
    z = torch.randn(4, 9, dtype=torch.float64)
    z[:, 6:] = -math.inf
    torch.testing.assert_close(entmax(z)[:, :6], entmax(z[:, :6]))
    assert not entmax(z)[:, 6:].any()
    assert not entmax(torch.full((2, 3), -math.inf)).any()


def test_attention_in_chunks_is_attention_at_once_with_shared_keys_mask_and_bias(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    draw = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, n, h, 8, generator=draw, dtype=torch.float64) for n, h in ((17, 4), (6, 2), (6, 2)))
    added = torch.zeros(2, 1, 6, dtype=torch.float64)
    added[1, 0, 4:] = -math.inf
    bias = LogitBias(*(torch.randn(2, 4, n, 2, generator=draw, dtype=torch.float64) for n in (17, 6)))
    whole = attend_to_text(q, k, v, 0.3, added, bias)
    monkeypatch.setattr(sparse_text, "AT_ONCE", 2 * 4 * 6 * 5)
    for one, other in zip(vars(whole).values(), vars(attend_to_text(q, k, v, 0.3, added, bias)).values()):
        torch.testing.assert_close(one, other)
    keys, values = (x.repeat_interleave(2, 2) for x in (k, v))
    logits = torch.einsum("bqhd,bkhd->bhqk", q, keys) * 0.3 + added[:, :, None] + bias.q @ bias.k.mT
    torch.testing.assert_close(whole.dense, torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1), values))
    torch.testing.assert_close(whole.sparse, torch.einsum("bhqk,bkhd->bqhd", by_bisection(logits, 1.5), values))
    torch.testing.assert_close(whole.lse, logits.logsumexp(-1).transpose(1, 2))


def test_the_step_is_along_the_sparse_result_and_no_longer_than_the_limit() -> None:
    sparse, dense = torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0, 1.0]])
    assert extrapolated(sparse, dense, 0.0, 15.0, 0.0).tolist() == [[2.0, 0.0]]
    assert extrapolated(sparse, dense, 3.0, 15.0, 0.0).tolist() == [[5.0, 0.0]]
    assert extrapolated(sparse, dense, 3.0, 15.0, 1.0).tolist() == [[5.0, -3.0]]
    assert extrapolated(sparse, dense, 3.0, 0.5, 0.0).tolist() == [[3.5, 0.0]]
    nothing = torch.zeros(1, 2)
    assert extrapolated(nothing, nothing, 3.0, 15.0, 0.0).tolist() == [[0.0, 0.0]]
