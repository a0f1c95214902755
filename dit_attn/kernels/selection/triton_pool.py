"""Pooling in one Triton kernel: mean, mean distance to the mean, and token count of every block, in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dit_attn.kernels.layouts.block_layout import ceil_div
from dit_attn.kernels.triton_launch import Launch

POOLED = 16384
"""Elements of a block that a program loads at a time."""


@triton.jit
def tokens_of(
    x, key_mask, low, last, x_s, columns,
    DIM: tl.constexpr, ROWS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Load ROWS tokens from ``low`` in fp32, 0 from ``last`` on and where they are masked; and which of them exist."""
    rows = low + tl.arange(0, ROWS)
    there = rows < last
    if MASKED:
        there = there & (tl.load(key_mask + rows, mask=there, other=0) != 0)
    pointers = x + rows.to(tl.int64)[:, None] * x_s + columns[None, :]
    tokens = tl.load(pointers, mask=there[:, None] & (columns[None, :] < DIM), other=0.0)
    return tokens.to(tl.float32), there


@triton.jit
def pool_kernel(
    x, key_mask, mean, distance, counts,
    seq, n, heads, x_b, x_s, x_h, mask_b,
    DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    MASKED: tl.constexpr, DISTANCE: tl.constexpr,
):  # fmt: skip
    """Store the mean of a block (B, H, n, D), its mean |x - mean|, and its token count (B, n)."""
    program = tl.program_id(0).to(tl.int64)
    block = (program % n).to(tl.int32)
    h = (program // n) % heads
    b = program // n // heads
    columns = tl.arange(0, WIDTH)
    x += b * x_b + h * x_h
    if MASKED:
        key_mask += b * mask_b
    first = block * BLOCK
    last = tl.minimum(first + BLOCK, seq)

    tokens, there = tokens_of(x, key_mask, first, last, x_s, columns, DIM, ROWS, MASKED)
    total, number = tl.sum(tokens, 0), tl.sum(there.to(tl.float32), 0)
    for start in tl.range(ROWS, BLOCK, ROWS):
        more, also = tokens_of(x, key_mask, first + start, last, x_s, columns, DIM, ROWS, MASKED)
        total += tl.sum(more, 0)
        number += tl.sum(also.to(tl.float32), 0)
    centre = total / tl.maximum(number, 1.0)
    at = program * DIM + columns
    tl.store(mean + at, centre, mask=columns < DIM)
    if h == 0:
        tl.store(counts + b * n + block, number)

    if DISTANCE:  # the first rows are still in registers, the others in the cache
        apart = tl.sum(tl.where(there[:, None], tl.abs(tokens - centre[None, :]), 0.0), 0)
        for start in tl.range(ROWS, BLOCK, ROWS):
            more, also = tokens_of(x, key_mask, first + start, last, x_s, columns, DIM, ROWS, MASKED)
            apart += tl.sum(tl.where(also[:, None], tl.abs(more - centre[None, :]), 0.0), 0)
        tl.store(distance + at, apart / tl.maximum(number, 1.0), mask=columns < DIM)


def fused_pool(
    x: torch.Tensor, block: int, key_mask: torch.Tensor | None = None, *, deviation: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Compute mean, mean distance to the mean (with ``deviation``) and count of the valid tokens of every block.

    Args:
        x: (B, S, H, D); fp32, fp16 or bf16, any strides.
        block: tokens per block; the last block may be ragged.
        key_mask: (B, S) bool, tokens that exist.
        deviation: also compute the mean distance.

    Returns:
        mean (B, H, n, D) fp32, mean distance (B, H, n, D) fp32 or ``None``, tokens (B, n) fp32.
    """
    batch, seq, heads, dim = x.shape
    n = ceil_div(seq, block)
    mean = torch.empty(batch, heads, n, dim, dtype=torch.float32, device=x.device)
    distance = torch.empty_like(mean) if deviation else None
    counts = torch.empty(batch, n, dtype=torch.float32, device=x.device)
    plan_pool(x, block, key_mask, mean, distance, counts).run()
    return mean, distance, counts


def plan_pool(
    x: torch.Tensor,
    block: int,
    key_mask: torch.Tensor | None,
    mean: torch.Tensor,
    distance: torch.Tensor | None,
    counts: torch.Tensor,
) -> Launch:
    """Prepare the launch that fills ``mean``, ``distance`` (if given) and ``counts``."""
    if x.stride(-1) != 1:
        x = x.contiguous()
    batch, seq, heads, dim = x.shape
    width = triton.next_power_of_2(dim)
    rows = min(triton.next_power_of_2(block), max(1, POOLED // width))
    mask = None if key_mask is None else key_mask.expand(batch, seq).contiguous().view(torch.uint8)
    arguments = {
        "x": x, "key_mask": mask, "mean": mean, "distance": distance, "counts": counts,
        "seq": seq, "n": mean.shape[2], "heads": heads, "x_b": x.stride(0), "x_s": x.stride(1), "x_h": x.stride(2),
        "mask_b": seq if mask is not None else 0,
        "DIM": dim, "WIDTH": width, "BLOCK": block, "ROWS": rows,
        "MASKED": mask is not None, "DISTANCE": distance is not None,
    }  # fmt: skip
    return Launch(pool_kernel, batch * heads * mean.shape[2], arguments, 8 if rows * width > 4096 else 4, 1)
