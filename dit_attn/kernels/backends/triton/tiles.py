"""Loads, stores, products and masks of tiles, which the attention kernels share.

A block list is loaded by inline PTX: an ordinary load inside a loop becomes a stage of its own in the compiler's
software pipeline, which then drains the prefetch of keys and values at every step.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def list_entry(pointer, INTERPRET: tl.constexpr):
    """Load one int32 of a block list outside of the software pipeline (see the module docstring)."""
    if INTERPRET:
        return tl.load(pointer)
    return tl.inline_asm_elementwise(
        "ld.global.nc.b32 $0, [$1];", "=r,l", [pointer], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def product(a, b, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """Multiply (M, K) x (K, N) with fp32 sums. ``UPCAST`` is for the interpreter, which cannot multiply bf16."""
    if UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def add_product(sums, a, b, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """Add a product to ``sums`` (M, N), which broadcasts. ``mma`` before Hopper does so at no cost."""
    if UPCAST:
        return sums + product(a, b, PRECISION, UPCAST)
    return tl.dot(a, b, tl.broadcast_to(sums, [a.shape[0], b.shape[1]]), input_precision=PRECISION)


@triton.jit
def rows_of(
    base, rows, stride, limit, FIRST: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr, CHECK: tl.constexpr
):  # fmt: skip
    """Load (R, WIDTH) channels ``FIRST ..`` of rows of a (S, DIM) tensor; 0 outside of it. ``CHECK`` masks rows."""
    columns = FIRST + tl.arange(0, WIDTH)
    pointers = base + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    if CHECK:
        if FIRST + WIDTH > DIM:
            return tl.load(pointers, mask=(rows[:, None] < limit) & (columns[None, :] < DIM), other=0.0)
        return tl.load(pointers, mask=rows[:, None] < limit, other=0.0)
    if FIRST + WIDTH > DIM:
        return tl.load(pointers, mask=columns[None, :] < DIM, other=0.0)
    return tl.load(pointers)


@triton.jit
def block_rows(base, start, stride, offsets, FIRST: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr):
    """Load (R, WIDTH) channels ``FIRST ..`` of rows from ``start`` on; ``offsets`` (R,) are those of rows 0, 1, ..."""
    # What does not depend on the block is added apart from what does, so that it is computed once, before the loop.
    columns = FIRST + tl.arange(0, WIDTH)
    pointers = base + start.to(tl.int64) * stride + (offsets[:, None] + columns[None, :])
    if FIRST + WIDTH > DIM:
        return tl.load(pointers, mask=columns[None, :] < DIM, other=0.0)
    return tl.load(pointers)


@triton.jit
def low_rank(extra_q, extra_k):
    """Compute a low-rank bias (M, N) in base 2; ``-inf`` where it bars, at most ``terms.BARRED``."""
    bias = tl.dot(extra_q, tl.trans(extra_k), input_precision="tf32x3")
    return tl.where(bias <= -1e4, float("-inf"), bias * LOG2E)


@triton.jit
def store_rows(base, rows, stride, limit, x, FIRST: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr):
    """Write (R, WIDTH) into channels ``FIRST ..`` of a (S, DIM) tensor."""
    columns = FIRST + tl.arange(0, WIDTH)
    pointers = base + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    tl.store(pointers, x.to(base.dtype.element_ty), mask=(rows[:, None] < limit) & (columns[None, :] < DIM))


@triton.jit
def axis_allowed(starts, places, size):
    """Evaluate the window rule along one axis; pointers to first positions and to positions of keys."""
    # Volatile: kept out of the loops they do not change in, where three tables of a tile would cost too many registers.
    distance = tl.load(places, volatile=True) - tl.load(starts, volatile=True)
    inside = distance.to(tl.uint32) < size.to(tl.uint32)
    return inside | ((distance + (1 << 29)).to(tl.uint32) >= (1 << 30))  # far: one of them is FREE, which is text


@triton.jit
def element_allowed(
    q, k, ma, mb, bits_row, key_in_block, KIND: tl.constexpr,
    n0, n1, n2, n3,
):  # fmt: skip
    """Evaluate an element mask for token numbers q and k that broadcast together. Kinds: ``element_masks.py``."""
    if KIND == 1:  # a window of n0 x n1 x n2 positions; tables (Sq, 3) of queries, (Sk, 3) of keys
        allowed = axis_allowed(ma + 3 * q, mb + 3 * k, n0)
        allowed = allowed & axis_allowed(ma + 3 * q + 1, mb + 3 * k + 1, n1)
        allowed = allowed & axis_allowed(ma + 3 * q + 2, mb + 3 * k + 2, n2)
    elif KIND == 2:  # band of n0 keys before and n1 after, n2 sink keys, queries shifted by n3
        distance = k - (q + n3)
        allowed = ((distance >= -n0) & (distance <= n1)) | (k < n2)
    elif KIND == 3:  # equal segment numbers
        allowed = tl.load(ma + q) == tl.load(mb + k)
    else:  # one bit per pair of this entry; bits_row points at the words of each query
        words = tl.load(bits_row + key_in_block // 32)
        allowed = ((words >> (key_in_block % 32)) & 1) != 0
    return allowed


@triton.jit
def bit_words(ma, b, h, ma_b, ma_h, row, entry, in_block, entries, Q_BLOCK: tl.constexpr, KV_BLOCK: tl.constexpr):
    """Return pointers to the words of queries ``in_block`` of query block ``row``, in their shape, for an entry."""
    words = (KV_BLOCK + 31) // 32
    base = b * ma_b + h * ma_h + (row.to(tl.int64) * entries + entry) * (Q_BLOCK * words)
    return ma + base + in_block * words
