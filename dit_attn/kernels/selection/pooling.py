"""Pooling of tokens into blocks: means, mean squares, mean distances and counts, without a copy of the sequence."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from dit_attn.kernels.checks import check_key_mask, check_sizes, check_tokens
from dit_attn.kernels.device import host_readable
from dit_attn.kernels.layouts.block_layout import ceil_div
from dit_attn.kernels.selection.dispatch import uses_triton

CPU_CHUNK = 1 << 20
"""Bytes of fp32 that a CPU widens at a time: they stay in its cache."""
DEVICE_CHUNK = 1 << 26
"""Bytes of fp32 temporaries at a time on other devices."""


def pool_blocks(x: torch.Tensor, block: int, key_mask: torch.Tensor | None = None) -> torch.Tensor:
    """Average the valid tokens of every block.

    Args:
        x: (B, S, H, D).
        block: tokens per block; the last block may be ragged.
        key_mask: (B, S) bool, tokens that exist; ``None`` for all.

    Returns:
        (B, H, n, D) fp32; 0 for a block without a valid token.

    Raises:
        DitAttnError: ``x``, ``block`` or ``key_mask`` does not fit.
    """
    _check(x, block, key_mask)
    return block_means(x, block, key_mask)


def pool_stats(x: torch.Tensor, block: int, key_mask: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the mean of every block, and per channel the mean distance of its tokens to that mean.

    With the mean ``m`` and the mean distance ``a = mean |x - m|`` of a query and a key block, the gain test of
    Rectified SpaAttn (its GAPR) is ``|mq . mk| > |aq . mk| + |mq . ak|``.

    Args:
        x, block, key_mask: as for :func:`pool_blocks`.

    Returns:
        mean and mean distance, (B, H, n, D) fp32 each; 0 for a block without a valid token.

    Raises:
        DitAttnError: ``x``, ``block`` or ``key_mask`` does not fit.
    """
    _check(x, block, key_mask)
    if uses_triton(None, x, head_dim=x.shape[-1]):
        from dit_attn.kernels.selection.triton_pool import fused_pool

        pooled, distance, _ = fused_pool(x, block, key_mask, deviation=True)
        assert distance is not None
        return pooled, distance
    means, distances = [], []
    for tokens, exists, number in _chunks(x, block, key_mask, True):
        mean = tokens.sum(2) / number
        distance = (tokens - mean[:, :, None]).abs()
        if exists is not None:
            distance = distance.masked_fill(~exists, 0.0)
        means.append(mean)
        distances.append(distance.sum(2) / number)
    return torch.cat(means, 1).transpose(1, 2), torch.cat(distances, 1).transpose(1, 2)


def _check(x: torch.Tensor, block: int, key_mask: torch.Tensor | None) -> None:
    check_tokens("x", x)
    check_sizes(block=block)
    check_key_mask(x, key_mask)


# -- without checks: for callers that made them ------------------------------------------------------------------------


def block_means(x: torch.Tensor, block: int, key_mask: torch.Tensor | None = None) -> torch.Tensor:
    """Average as :func:`pool_blocks` does, without its checks."""
    means = [tokens.sum(2, dtype=torch.float32) / number for tokens, _, number in _chunks(x, block, key_mask, False)]
    return torch.cat(means, 1).transpose(1, 2)


def block_mean_squares(x: torch.Tensor, block: int, key_mask: torch.Tensor | None = None) -> torch.Tensor:
    """Average the squared tokens of every block, (B, H, n, D) fp32, without squaring all of x at once."""
    chunks = _chunks(x, block, key_mask, True)
    return torch.cat([tokens.square().sum(2) / number for tokens, _, number in chunks], 1).transpose(1, 2)


def block_counts(x: torch.Tensor, block: int, key_mask: torch.Tensor | None = None) -> torch.Tensor:
    """Count the valid tokens of every block of x (B, S, H, D): (B|1, 1, n) fp32."""
    seq = x.shape[1]
    n = ceil_div(seq, block)
    if key_mask is not None:
        return F.pad(key_mask, (0, n * block - seq)).unflatten(1, (n, block)).sum(-1, dtype=torch.float32)[:, None]
    starts = torch.arange(n, device=x.device) * block
    return (seq - starts).clamp(max=block).to(torch.float32).view(1, 1, n)


def _chunks(
    x: torch.Tensor, block: int, key_mask: torch.Tensor | None, widen: bool
) -> Iterator[tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]]:
    """Runs of blocks: tokens (B, m, block, H, D), 0 where they do not exist; which exist; their number, at least 1.

    The sequence is never copied as one: plain sums run on it in place, and what has to be widened to fp32 or masked is
    copied chunk by chunk (a CPU sums bf16 several times slower than it widens it and sums it in cache).
    """
    seq = x.shape[1]
    full = seq // block
    cpu = host_readable(x)
    widen = widen or (cpu and x.dtype in (torch.bfloat16, torch.float16))
    step = max(full, 1)
    if (widen or key_mask is not None) and not torch.compiler.is_compiling():
        each = 4 * x.shape[0] * block * x.shape[2] * x.shape[3]
        step = max(1, (CPU_CHUNK if cpu else DEVICE_CHUNK) // max(each, 1))
    bounds = [(low, min(low + step, full), block) for low in range(0, full, step)]
    if seq % block or not seq:
        bounds.append((full, full + 1, seq - full * block))
    for low, high, length in bounds:
        tokens = x[:, low * block : low * block + (high - low) * length].unflatten(1, (high - low, length))
        tokens = tokens.to(torch.float32) if widen else tokens
        exists, number = None, torch.full((), float(max(length, 1)), device=x.device)
        if key_mask is not None:
            present = key_mask[:, low * block : low * block + (high - low) * length].unflatten(1, (high - low, length))
            exists = present[..., None, None]
            tokens = tokens.masked_fill(~exists, 0.0)
            number = exists.sum(2, dtype=torch.float32).clamp(min=1.0)
        yield tokens, exists, number
