"""The budget of a selection: a density or a softmax mass, its check, and the number of blocks it stands for."""

from __future__ import annotations

import math
from typing import overload

import torch

from dit_attn.errors import DitAttnError
from dit_attn.kernels.device import host_readable

Budget = float | torch.Tensor
"""A fraction in (0, 1]: a number, or a 0-d fp32 or fp64 tensor whose value may change between calls of one graph."""


def check_budget(density: Budget | None, top_p: Budget | None) -> None:
    """Check that exactly one of the two is given, in (0, 1].

    The value of a tensor on a device, or in a graph that is being traced, is not read; it is clamped where it is used.

    Raises:
        DitAttnError: both or neither are given, or one is out of range or no 0-d tensor.
    """
    if (density is None) == (top_p is None):
        raise DitAttnError(f"give exactly one of density and top_p, got density={density} and top_p={top_p}")
    name = "density" if top_p is None else "top_p"
    fraction = density if top_p is None else top_p
    if isinstance(fraction, torch.Tensor):
        if fraction.ndim or fraction.dtype not in (torch.float32, torch.float64):
            raise DitAttnError(
                f"{name} as a tensor must be 0-d float32 or float64, got {tuple(fraction.shape)} {fraction.dtype}; "
                "give torch.tensor(0.25, device=q.device)"
            )
        if not host_readable(fraction):
            return
    if density is not None and not 0.0 < density <= 1.0:
        raise DitAttnError(f"density is the fraction of key blocks per query block, in (0, 1], got {density}")
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise DitAttnError(f"top_p is a fraction of the softmax mass in (0, 1], got {top_p}; 0.9 keeps 90 % of it")


@overload
def blocks_of_density(density: float, kv_blocks: int) -> int: ...


@overload
def blocks_of_density(density: Budget, kv_blocks: int) -> int | torch.Tensor: ...


def blocks_of_density(density: Budget, kv_blocks: int) -> int | torch.Tensor:
    """Return ``ceil(density * kv_blocks)``, at least 1.

    A small slack prevents a rounded product such as 0.07 * 100 = 7.000000000000001 from costing one block more. For a
    tensor the result is a 0-d int64 tensor, and the slack covers the rounding of its dtype.
    """
    if isinstance(density, torch.Tensor):
        slack = max(1e-9, torch.finfo(density.dtype).eps * kv_blocks)
        return torch.ceil(density.double() * kv_blocks - slack).clamp(1, kv_blocks).long()
    return max(1, min(math.ceil(density * kv_blocks - 1e-9), kv_blocks))
