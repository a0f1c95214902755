"""Error measures against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from dit_attn.errors import DitAttnError
from dit_attn.eval import fidelity
from dit_attn.kernels import BlockLayout, sparse_attention


def test_errors_of_known_vectors() -> None:
    exact = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    assert fidelity.relative_l2(exact, exact) == 0.0
    assert fidelity.relative_l2(exact + torch.tensor([0.0, 5.0]), exact) == pytest.approx(math.sqrt(50) / 5)
    assert fidelity.cosine(exact.flip(-1), exact) == 0.0 and fidelity.cosine(2 * exact, exact) == pytest.approx(1.0)
    assert fidelity.latent_psnr(exact + 0.4, exact) == pytest.approx(20.0, abs=1e-5)
    assert fidelity.latent_psnr(exact, exact) == math.inf


def test_a_shift_is_what_averaging_leaves() -> None:
    exact = torch.randn(1000, 8, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(1000, 8, generator=torch.Generator().manual_seed(1))
    assert fidelity.mean_shift(exact + 0.1, exact) == pytest.approx(0.1, rel=0.05)
    assert fidelity.mean_shift(exact + 0.1 * noise, exact) < 0.01


def test_recalled_mass_is_the_share_of_the_softmax() -> None:
    q, k = (torch.randn(1, 64, 2, 16, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    layout = BlockLayout.from_mask(torch.tensor([[[[True, False]] * 2]]), 64, 64, 32, 32)
    read = sparse_attention(q, k, k, layout, return_lse=True)[1]
    whole = sparse_attention(q, k, k, BlockLayout.dense(64, 64, 32, 32), return_lse=True, backend="gather")[1]
    weights = torch.softmax(torch.einsum("bqhd,bkhd->bhqk", q, k) * 0.25, -1)
    torch.testing.assert_close(fidelity.recalled_mass(read, whole), weights[..., :32].sum(-1))


def test_steady_motion_is_smooth_and_flicker_is_not() -> None:
    steady = torch.arange(8.0)[:, None, None, None].expand(8, 3, 4, 4)
    flicker = (torch.arange(8) % 2).float()[:, None, None, None].expand(8, 3, 4, 4)
    assert fidelity.temporal_consistency(steady) == 1.0 == fidelity.temporal_consistency(torch.zeros(5, 3, 4, 4))
    assert fidelity.temporal_consistency(flicker) == pytest.approx(-1.0)
    with pytest.raises(DitAttnError, match="T of at least 3"):
        fidelity.temporal_consistency(steady[:2])
    with pytest.raises(DitAttnError, match="one shape"):
        fidelity.cosine(steady, steady[:2])
