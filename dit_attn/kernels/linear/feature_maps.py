"""Feature maps of linear attention: they make the weight of a key a product of a query's and a key's features."""

from __future__ import annotations

import torch
import torch.nn.functional as F

FEATURE_MAPS = ("softmax", "elu", "relu")
"""``softmax`` over the channels, ``elu`` + 1, or ``relu``."""


def feature_map(x: torch.Tensor, name: str) -> torch.Tensor:
    """Map the last dimension of x to features of at least 0, of the same shape."""
    if name == "softmax":
        return torch.softmax(x, -1)
    return F.elu(x) + 1.0 if name == "elu" else torch.relu(x)


def feature_gradient(x: torch.Tensor, features: torch.Tensor, grad: torch.Tensor, name: str) -> torch.Tensor:
    """Compute the gradient of x from that of its features."""
    if name == "softmax":
        return features * (grad - (features * grad).sum(-1, keepdim=True))
    if name == "elu":
        return grad * torch.where(x > 0.0, 1.0, features)  # e^x, which the map is below 0
    return grad.masked_fill(x <= 0.0, 0.0)
