"""Distances between two sets of image features: Fréchet (FID) and kernel (KID)."""

from __future__ import annotations

import torch


def frechet_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the Fréchet distance between Gaussians fitted to two sets of features, the arithmetic of FID.

    |mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)) with covariances A and B (Heusel et al. 2017, eq. 6, 1706.08500).
    With A = X'X and B = Y'Y the last trace is the nuclear norm of X Y', which needs no matrix root and is exact for few
    samples.

    Args:
        a, b: (N, D) and (M, D), fp64.
    """
    x, y = _covariance_root(a), _covariance_root(b)
    spread = x.square().sum() + y.square().sum() - 2.0 * torch.linalg.svdvals(x @ y.T).sum()
    return max(float((a.mean(0) - b.mean(0)).square().sum() + spread), 0.0)


def _covariance_root(features: torch.Tensor) -> torch.Tensor:
    """X with X'X the covariance of (N, D) features, of at most D rows."""
    x = (features - features.mean(0)) / (len(features) - 1) ** 0.5
    return torch.linalg.qr(x, mode="r").R if len(x) > x.shape[1] else x


def kernel_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the squared maximum mean discrepancy of two sets of features under KID's cubic kernel.

    Unbiased, over all pairs (Binkowski et al. 2018, 1801.01401); the means over subsets of other implementations
    estimate this number.

    Args:
        a, b: (N, D) and (M, D), fp64.
    """

    def kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (x @ y.T / x.shape[1] + 1.0) ** 3

    def among(x: torch.Tensor) -> torch.Tensor:
        products = kernel(x, x)
        return (products.sum() - products.diagonal().sum()) / (len(x) * (len(x) - 1))

    return float(among(a) + among(b) - 2.0 * kernel(a, b).mean())
