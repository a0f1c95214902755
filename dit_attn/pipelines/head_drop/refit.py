"""Fit the output projection of a layer to some of its heads, in closed form.

With the kept channels S of the head outputs Z, their means and the covariance C of Z, the projection W is replaced by
the one that is nearest on the measured tokens::

    W' = (C_SS + l I)^-1 (C_S: W + l W_S)        b' = b + mean(Z) W - mean(Z_S) W'        l = ridge * trace(C_SS) / |S|
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dit_attn.pipelines.head_drop.profile import LayerProfile, Moments

RIDGE = 1e-3


def refit(moments: Moments, channels: torch.Tensor, ridge: float = RIDGE) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the projection W' (|S|, C) of the channels S, and what is added to the bias (C,), fp64.

    Args:
        moments: of the layer.
        channels: the channels S.
        ridge: weight of the old projection.
    """
    covariance = moments.covariance
    own = covariance[channels][:, channels]
    strength = ridge * own.diagonal().mean().clamp(min=1e-30)
    left = own + strength * torch.eye(len(channels), dtype=own.dtype)
    weight = torch.linalg.solve(left, covariance[channels] @ moments.weight + strength * moments.weight[channels])
    return weight, moments.mean @ moments.weight - moments.mean[channels] @ weight


def dropping_error(layer: LayerProfile, kept: Sequence[int], refitted: bool = True, ridge: float = RIDGE) -> float:
    """Return the mean squared error of a layer's output on the measured tokens, with these heads alone.

    Args:
        layer: its profile.
        kept: heads that stay.
        refitted: with refitted projections; otherwise with the slices of the old ones.
        ridge: as for :func:`refit`.
    """
    channels, total = layer.channels(kept), 0.0
    for moments in layer.streams.values():
        if not moments.count:
            continue
        full, second = moments.weight, moments.square / moments.count
        if refitted:
            weight, shift = refit(moments, channels, ridge)
        else:
            weight, shift = full[channels], torch.zeros(full.shape[1], dtype=full.dtype)
        change = full.clone()
        change[channels] -= weight  # the error of a token is z change - shift
        total += float((change * (second @ change)).sum() - 2 * (moments.mean @ change) @ shift + shift @ shift)
    return max(total, 0.0)
