"""The weight map of AnomalyDiffusion (arXiv 2312.05767): cells of a mask where little has changed weigh more."""

from __future__ import annotations

import torch
import torch.nn.functional as F

NORMS = ("scaled", "reciprocal", "paper")
"""How changes become weights: softmax of 1 / change in units of its median; the reciprocal itself, in the same units;
or the paper's softmax of 1 / change, which depends on the unit."""
_LEAST = 1e-12  # a change that is as good as none, where the paper divides by it


def weight_map(
    change: torch.Tensor,
    region: torch.Tensor,
    *,
    norm: str = "scaled",
    offset: float = 0.1,
    softness: float = 1.0,
    low: float = 1.0,
    high: float = 4.0,
) -> torch.Tensor:
    """Return the weights of cells: w = |M| a within [low, high] inside the mask M, 1 outside.

    With u = change / median of M and f = 1 / (u + offset), a is the softmax over M of f / softness (``scaled``), or f
    over its sum (``reciprocal``). ``paper``: the softmax of 1 / change, as it is. Equal changes weigh 1.

    Args:
        change: (N, H, W), at least 0: how far every cell is from the normal image.
        region: (N, H, W) bool, the mask; where it is empty all weights are 1.
        norm: of :data:`NORMS`.
        offset: bounds the weight of a cell that has not changed.
        softness: larger ones bring the weights together.
        low, high: bounds of the weights inside the mask.

    Returns:
        (N, H, W) fp32.
    """
    d, inside = change.flatten(1).double(), region.flatten(1)
    if norm == "paper":
        score = 1.0 / d.clamp(min=_LEAST)
    else:
        score = 1.0 / (d / _unit(d, inside) + offset)
    if norm != "reciprocal":
        score = score / (softness if norm == "scaled" else 1.0)
        peak = score.masked_fill(~inside, -torch.inf).amax(1, keepdim=True)
        score = torch.exp((score - peak).clamp(max=0.0))
    score = score.masked_fill(~inside, 0.0)
    mean = score.sum(1, keepdim=True) / inside.sum(1, keepdim=True).clamp(min=1)
    weights = (score / mean.clamp(min=1e-300)).clamp(low, high)
    return torch.where(inside, weights, torch.ones_like(weights)).view(change.shape).float()


def blurred(weights: torch.Tensor, region: torch.Tensor) -> torch.Tensor:
    """Return weights (N, H, W) as means over 3 x 3 cells of the mask; outside they stay."""
    inside = region.float()
    total, count = (F.avg_pool2d(F.pad(x[:, None], (1,) * 4), 3, 1)[:, 0] for x in (weights * inside, inside))
    return torch.where(region, total / count.clamp(min=1 / 9), weights)


def _unit(d: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    """The median change of every mask, its mean where that is 0, and 1 where nothing has changed; (N, 1)."""
    own = d.masked_fill(~inside, torch.nan)
    median, mean = own.nanmedian(1, keepdim=True).values, own.nanmean(1, keepdim=True)
    unit = torch.where(median > 0, median, mean).nan_to_num(0.0)
    return torch.where(unit > 0, unit, torch.ones_like(unit))
