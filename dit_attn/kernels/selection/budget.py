"""The budget of a selection: a density or a softmax mass, for all heads or for each, its check, and its key blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, overload

import torch

from dit_attn.errors import DitAttnError, shorten
from dit_attn.kernels.checks import dtype_name
from dit_attn.kernels.device import host_readable
from dit_attn.kernels.layouts.cache import cached

Budget = float | Sequence[float] | torch.Tensor
"""Fractions in (0, 1]: a number for all query heads, H numbers, or a tensor, whose values may change between calls of
one graph: 0-d, (H,) or (B|1, H), fp32 or fp64. An integer tensor (H,) or (B|1, H) given as density counts key
blocks."""
_COUNTS = (torch.int32, torch.int64)
_FRACTIONS = (torch.float32, torch.float64)


def check_budget(
    density: Budget | None, top_p: Budget | None, k_min: int | Sequence[int], batch: int, heads: int
) -> None:
    """Check that exactly one of the two is given, in (0, 1], for all heads or for each.

    The values of a tensor on a device, or in a graph that is being traced, are not read; they are clamped where they
    are used.

    Args:
        density, top_p: the budget.
        k_min: smallest number of blocks per row; as a sequence one for each head.
        batch, heads: B and the number of query heads H that it is for.

    Raises:
        DitAttnError: both or neither are given, a value is out of range, or the shape or dtype does not fit.
    """
    if (density is None) == (top_p is None):
        raise DitAttnError(f"give exactly one of density and top_p, got density={density} and top_p={top_p}")
    if isinstance(k_min, Sequence) and len(k_min) != heads:
        raise DitAttnError(f"k_min must be a number, or {heads} numbers, one for each head, got {shorten(k_min)}")
    name, given = ("density", density) if density is not None else ("top_p", top_p)
    if isinstance(given, torch.Tensor):
        counts = name == "density" and given.dtype in _COUNTS and given.ndim > 0
        shapes = ((), (heads,), (1, heads), (batch, heads))
        if given.shape not in shapes or not (counts or given.dtype in _FRACTIONS):
            raise DitAttnError(
                f"{name} as a tensor must be 0-d float32 or float64, or of each of {heads} heads, ({heads},) or "
                f"(B|1, {heads}), got {tuple(given.shape)} {dtype_name(given.dtype)}; give torch.tensor(0.25, "
                "device=q.device)"
            )
        if not host_readable(given):
            return
        if counts:
            if given.numel() and int(given.min()) < 1:
                raise DitAttnError(f"density as integers counts key blocks, at least 1, got {int(given.min())}")
            return
        values = given.reshape(-1).tolist()
    elif isinstance(given, Sequence):
        values = list(given)
        if len(values) != heads or not all(_is_number(value) for value in values):
            raise DitAttnError(
                f"{name} must be a number, or {heads} numbers, one for each query head, got {shorten(given)}"
            )
    else:
        values = [given]
    worst = next((value for value in values if not 0.0 < value <= 1.0), None)
    if worst is None:
        return
    if name == "density":
        raise DitAttnError(f"density is the fraction of key blocks per query block, in (0, 1], got {worst}")
    raise DitAttnError(f"top_p is a fraction of the softmax mass in (0, 1], got {worst}; 0.9 keeps 90 % of it")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@overload
def blocks_of_density(density: float, kv_blocks: int) -> int: ...


@overload
def blocks_of_density(density: float | tuple[float, ...], kv_blocks: int) -> int | tuple[int, ...]: ...


@overload
def blocks_of_density(density: Budget, kv_blocks: int) -> int | tuple[int, ...] | torch.Tensor: ...


def blocks_of_density(density: Budget, kv_blocks: int) -> int | tuple[int, ...] | torch.Tensor:
    """Return ``ceil(density * kv_blocks)``, at least 1, for all heads or for each.

    A small slack prevents a rounded product such as 0.07 * 100 = 7.000000000000001 from costing one block more. For a
    tensor the result is an int64 tensor of its shape, and the slack covers the rounding of its dtype.
    """
    if isinstance(density, torch.Tensor):
        if not density.is_floating_point():
            return density.clamp(1, kv_blocks).long()
        slack = max(1e-9, torch.finfo(density.dtype).eps * kv_blocks)
        return torch.ceil(density.double() * kv_blocks - slack).clamp(1, kv_blocks).long()
    if isinstance(density, Sequence):
        return tuple(blocks_of_density(float(value), kv_blocks) for value in density)
    return max(1, min(math.ceil(density * kv_blocks - 1e-9), kv_blocks))


class BlockBudget(NamedTuple):
    """A budget, ready to be used.

    Attributes:
        blocks: key blocks of every row, with a mass the fewest: an int, or int64 (B|1, H|1, 1).
        mass: softmax mass to reach: a float, or fp32 (B|1, H|1, 1); ``None`` with a density.
        most: upper bound of ``blocks`` that is known without reading a device.
    """

    blocks: int | torch.Tensor
    mass: float | torch.Tensor | None
    most: int


def resolve_budget(
    density: Budget | None, top_p: Budget | None, k_min: int | Sequence[int], kv_blocks: int, device: torch.device
) -> BlockBudget:
    """Return a checked budget in key blocks.

    Args:
        density, top_p: one of them.
        k_min: with ``top_p``, the smallest number of blocks per row, of all heads or of each.
        kv_blocks: key blocks per row.
        device: where it is used.
    """
    fewest = k_min if density is None else blocks_of_density(density, kv_blocks)
    count = _by_head(fewest, torch.int64, device)
    most = int(count) if isinstance(count, int) else max(fewest) if isinstance(fewest, Sequence) else kv_blocks
    return BlockBudget(count, None if top_p is None else _by_head(top_p, torch.float32, device), most)


def _by_head(value: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """A number as it is; anything else as (B|1, H|1, 1). Equal heads are one number."""
    if isinstance(value, torch.Tensor):
        value = value.to(device, dtype)
        return value[(None,) * (2 - value.ndim)][..., None]
    if not isinstance(value, Sequence):
        return value
    return value[0] if len(set(value)) == 1 else _row(tuple(value), dtype, device)


@cached
def _row(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, device=device)[None, :, None]
