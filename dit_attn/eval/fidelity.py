"""Distance of a method from dense attention: attention outputs, latents, softmax mass, and frames of a video."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from dit_attn.errors import DitAttnError


def relative_l2(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Compute |found - exact| / |exact| over all elements, in fp64; 0 is equal."""
    _same_shape(found, exact)
    exact = exact.double()
    return float((found.double() - exact).norm() / exact.norm().clamp(min=torch.finfo(torch.float64).tiny))


def mean_shift(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Compute the size of the mean signed error per channel (the last dimension), relative to the rms of ``exact``.

    What is left of an error when tokens are averaged: visible as a change of brightness or color.
    """
    _same_shape(found, exact)
    error = (found.double() - exact.double()).flatten(0, -2).mean(0)
    return float(error.norm() / exact.double().flatten(0, -2).square().mean(0).sum().sqrt().clamp(min=1e-300))


def cosine(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Compute the mean cosine of the vectors along the last dimension."""
    _same_shape(found, exact)
    return float(F.cosine_similarity(found.double(), exact.double(), dim=-1).mean())


def recalled_mass(lse_sparse: torch.Tensor, lse_dense: torch.Tensor) -> torch.Tensor:
    """Compute the share of the dense softmax that a sparse call attends to, exp(lse_sparse - lse_dense), per row.

    Args:
        lse_sparse: (B, H, S) log-sum-exp over the attended keys, natural logarithm.
        lse_dense: (B, H, S) log-sum-exp over all keys.
    """
    _same_shape(lse_sparse, lse_dense)
    return torch.exp(lse_sparse - lse_dense).clamp(max=1.0)


def latent_psnr(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Compute the PSNR of latents in dB; the peak is the range of ``exact``. Equal latents give infinity."""
    _same_shape(found, exact)
    exact = exact.double()
    error = (found.double() - exact).square().mean()
    peak = exact.max() - exact.min()
    return float(10.0 * torch.log10(peak.square() / error))


def temporal_consistency(frames: torch.Tensor) -> float:
    """Measure how smoothly a video moves: 1 - |second difference| / |first difference| over time, at most 1.

    A still video and one of constant change give 1; flicker, which changes sign from frame to frame, goes below 0.

    Args:
        frames: (T, 3, H, W) uint8 or float, T >= 3.
    """
    if frames.ndim != 4 or len(frames) < 3:
        raise DitAttnError(f"temporal consistency needs (T, 3, H, W) with T of at least 3, got {tuple(frames.shape)}")
    step = frames.double().diff(dim=0)
    moved = step.abs().mean()
    if moved == 0.0:
        return 1.0
    return float(1.0 - step.diff(dim=0).abs().mean() / moved)


def _same_shape(a: torch.Tensor, b: torch.Tensor) -> None:
    if a.shape != b.shape:
        raise DitAttnError(f"two tensors to compare must have one shape, got {tuple(a.shape)} and {tuple(b.shape)}")
