"""Argument checks shared by layouts, selection and the operator: one line that names the argument and the remedy."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from dit_attn.errors import DitAttnError

INTS = (torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8)


def is_whole(value: Any, least: int) -> bool:
    """Return whether a value is an integer of at least ``least``."""
    return isinstance(value, (int, torch.SymInt, np.integer)) and bool(value >= least)


def check_sizes(**sizes: Any) -> None:
    """Check that every size is an integer of at least 1.

    Raises:
        DitAttnError: for the first one that is not.
    """
    for name, size in sizes.items():
        if not is_whole(size, 1):
            raise DitAttnError(f"{name} must be at least 1, a whole number, got {size!r}")


def check_blocks(
    name: str, x: torch.Tensor, q_len: int, kv_len: int, q_block: int, kv_block: int, dtype: torch.dtype | None = None
) -> None:
    """Check that x is (B|1, H|1, nq, nk) for these sizes, and of ``dtype`` if one is given.

    Raises:
        DitAttnError: it is not.
    """
    check_sizes(q_len=q_len, kv_len=kv_len, q_block=q_block, kv_block=kv_block)
    expected = (-(-q_len // q_block), -(-kv_len // kv_block))
    if x.ndim != 4 or tuple(x.shape[-2:]) != expected:
        raise DitAttnError(
            f"{name} must be (B|1, H|1, {expected[0]}, {expected[1]}) for {q_len} x {kv_len} tokens in blocks of "
            f"{q_block} x {kv_block}, got {tuple(x.shape)}; pool with the same block sizes"
        )
    if dtype is not None and x.dtype != dtype:
        raise DitAttnError(f"{name} must be {dtype_name(dtype)}, got {dtype_name(x.dtype)}; compare it with something")


def check_choices(shape: tuple[int, ...], forced: torch.Tensor | None) -> None:
    """Check that ``forced`` is ``None``, or bool and expands to ``shape`` (B, H, nq, nk).

    Raises:
        DitAttnError: it is not.
    """
    if forced is None:
        return
    if forced.dtype != torch.bool:
        raise DitAttnError(f"forced must be bool, got {dtype_name(forced.dtype)}; compare it with something first")
    if forced.ndim > 4 or any(have not in (1, want) for have, want in zip(forced.shape[::-1], shape[::-1])):
        raise DitAttnError(f"forced must expand to (B, H, nq, nk) = {shape}, got {tuple(forced.shape)}")


def check_tokens(name: str, x: torch.Tensor) -> None:
    """Check that x is (B, S, H, D) of a floating-point dtype.

    Raises:
        DitAttnError: it is not.
    """
    if x.ndim != 4:
        raise DitAttnError(
            f"{name} must be (B, S, H, D), got {x.ndim} dimensions {tuple(x.shape)}; split the heads with unflatten"
        )
    if not x.is_floating_point():
        raise DitAttnError(f"{name} must be of a floating-point dtype, got {dtype_name(x.dtype)}; cast it")


def check_heads(q: torch.Tensor, k: torch.Tensor) -> None:
    """Check that q (B, S, H, D) and k (B, Sk, Hk, D) share B and D, and that H is a multiple of Hk.

    Raises:
        DitAttnError: they do not.
    """
    if k.shape[0] != q.shape[0]:
        raise DitAttnError(f"q has batch {q.shape[0]} and k has batch {k.shape[0]}; expand k (and v) to q's batch")
    if q.shape[-1] != k.shape[-1]:
        raise DitAttnError(f"q and k must share the head size D, got {q.shape[-1]} and {k.shape[-1]}")
    if k.shape[2] == 0 or q.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise DitAttnError(
            f"q has {q.shape[2]} heads, which is not a multiple of the {k.shape[2]} heads of k; repeat the heads of k "
            "(and v), or check that the tensors are (B, S, H, D) and not (B, H, S, D)"
        )


def check_key_mask(k: torch.Tensor, key_mask: torch.Tensor | None, shared: bool = True) -> None:
    """Check that ``key_mask`` is ``None`` or (B, Sk) bool for k (B, Sk, Hk, D); or (1, Sk) if ``shared``.

    Raises:
        DitAttnError: it is not.
    """
    if key_mask is None:
        return
    (batch, keys), rows = k.shape[:2], key_mask.shape[0] if key_mask.ndim == 2 else 0
    fits = key_mask.ndim == 2 and key_mask.shape[1] == keys and (rows == batch or (shared and rows == 1))
    if key_mask.dtype != torch.bool or not fits:
        raise DitAttnError(
            f"key_mask must be bool ({batch}, {keys}) = (B, Sk), True for keys that exist, got "
            f"{dtype_name(key_mask.dtype)} {tuple(key_mask.shape)}; pass one row per sample"
        )


def dtype_name(dtype: torch.dtype) -> str:
    """Return ``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")
