"""Triton kernels of linear attention over key blocks; the formulas are those of ``products``.

Features are computed where they are used and never stored. Every output element is written by one program, so the
result is the same in every run. Channels are padded to a power of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dit_attn.kernels.backends.triton.tiles import product, rows_of, store_rows


@triton.jit
def features(x, DIM: tl.constexpr, WIDTH: tl.constexpr, MAP: tl.constexpr):
    """Map (R, WIDTH) channels, DIM of them real, to fp32 features; 0 past DIM. Maps: softmax, elu + 1, relu."""
    real = (tl.arange(0, WIDTH) < DIM)[None, :]
    if MAP == 0:
        x = tl.where(real, x, float("-inf"))
        weights = tl.exp(x - tl.max(x, 1)[:, None])
        return weights / tl.sum(weights, 1)[:, None]
    if MAP == 1:
        return tl.where(real, tl.where(x > 0.0, x + 1.0, tl.exp(tl.minimum(x, 0.0))), 0.0)
    return tl.maximum(x, 0.0)


@triton.jit
def feature_gradients(x, f, df, MAP: tl.constexpr):
    """Compute the gradient of x from that of its features f."""
    if MAP == 0:
        return f * (df - tl.sum(f * df, 1)[:, None])
    if MAP == 1:
        return df * tl.where(x > 0.0, 1.0, f)
    return tl.where(x > 0.0, df, 0.0)


@triton.jit
def key_features(
    k_base, v_base, weight, rows, k_s, v_s, kv_len,
    DIM: tl.constexpr, DK: tl.constexpr, VDIM: tl.constexpr, DV: tl.constexpr, MAP: tl.constexpr, WEIGHT: tl.constexpr,
):  # fmt: skip
    """Load some keys: fp32 k, their features, their weights, and their values; 0 where they do not exist."""
    x = rows_of(k_base, rows, k_s, kv_len, 0, DK, DIM, True).to(tl.float32)
    y = rows_of(v_base, rows, v_s, kv_len, 0, DV, VDIM, True)
    w = (rows < kv_len).to(tl.float32)
    if WEIGHT:
        w = tl.load(weight + rows, mask=rows < kv_len, other=0.0)
        x, y = tl.where(w[:, None] > 0.0, x, 0.0), tl.where(w[:, None] > 0.0, y, 0.0)
    return x, features(x, DIM, DK, MAP), w, y


@triton.jit(do_not_specialize=["kv_len"])
def key_sums_kernel(
    k, v, weight, sums, totals, k_b, k_s, k_h, v_b, v_s, v_h, w_b, w_h, heads, blocks, kv_len,
    BN: tl.constexpr, PARTS: tl.constexpr, DIM: tl.constexpr, DK: tl.constexpr, VDIM: tl.constexpr, DV: tl.constexpr,
    MAP: tl.constexpr, WEIGHT: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Compute H (B, Hk, nk, D, Dv) and Z (B, Hk, nk, D) of one key block."""
    program = tl.program_id(0)
    block = program % blocks
    h = ((program // blocks) % heads).to(tl.int64)
    b = ((program // blocks) // heads).to(tl.int64)
    acc = tl.zeros([DK, DV], tl.float32)
    total = tl.zeros([DK], tl.float32)
    for part in range(PARTS):
        rows = (block * PARTS + part) * BN + tl.arange(0, BN)
        _, g, w, y = key_features(
            k + b * k_b + h * k_h, v + b * v_b + h * v_h, weight + b * w_b + h * w_h, rows, k_s, v_s, kv_len,
            DIM, DK, VDIM, DV, MAP, WEIGHT,
        )  # fmt: skip
        g = g * w[:, None]
        acc += product(tl.trans(g.to(y.dtype)), y, PRECISION, UPCAST)
        total += tl.sum(g, 0)
    place = program.to(tl.int64)
    channels = tl.arange(0, DK)
    store_rows(sums + place * (DIM * VDIM), channels, VDIM, DIM, acc, 0, DV, VDIM)
    tl.store(totals + place * DIM + channels, total, mask=channels < DIM)


@triton.jit
def block_sums(
    h, z, head, block, h_h, h_i, z_h, z_i, DIM: tl.constexpr, DK: tl.constexpr, VDIM: tl.constexpr, DV: tl.constexpr
):  # fmt: skip
    """Load the (D, Dv) and (D,) sums of one block of one head."""
    channels = tl.arange(0, DK)
    base = h + head * h_h + block.to(tl.int64) * h_i
    total = tl.load(z + head * z_h + block.to(tl.int64) * z_i + channels, mask=channels < DIM, other=0.0)
    return rows_of(base, channels, VDIM, DIM, 0, DV, VDIM, True), total


@triton.jit
def inverse_of(f, z):
    """Compute 1 / (f . z) of every row, and 0 where that is 0."""
    den = tl.sum(f * z[None, :], 1)
    return tl.where(den > 0.0, 1.0 / tl.where(den > 0.0, den, 1.0), 0.0)


@triton.jit(do_not_specialize=["q_len"])
def rows_kernel(
    q, h, z, out, q_b, q_s, q_h, o_b, o_s, o_h, h_h, h_i, z_h, z_i, heads, ratio, blocks, q_len,
    BM: tl.constexpr, PARTS: tl.constexpr, DIM: tl.constexpr, DK: tl.constexpr, VDIM: tl.constexpr, DV: tl.constexpr,
    MAP: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Compute the rows of one query block; ``ratio`` query heads share their sums."""
    program = tl.program_id(0)
    block = program % blocks
    head = (program // blocks).to(tl.int64)
    b, hd = head // heads, head % heads
    sums, total = block_sums(h, z, head // ratio, block, h_h, h_i, z_h, z_i, DIM, DK, VDIM, DV)
    for part in range(PARTS):
        rows = (block * PARTS + part) * BM + tl.arange(0, BM)
        x = rows_of(q + b * q_b + hd * q_h, rows, q_s, q_len, 0, DK, DIM, True).to(tl.float32)
        f = features(x, DIM, DK, MAP)
        y = product(f.to(sums.dtype), sums, PRECISION, UPCAST) * inverse_of(f, total)[:, None]
        store_rows(out + b * o_b + hd * o_h, rows, o_s, q_len, y, 0, DV, VDIM)


@triton.jit(do_not_specialize=["q_len"])
def row_gradients_kernel(
    q, h, z, out, grad, dq, sums, totals,
    q_b, q_s, q_h, o_b, o_s, o_h, g_b, g_s, g_h, dq_b, dq_s, dq_h, h_h, h_i, z_h, z_i, heads, ratio, blocks, q_len,
    BM: tl.constexpr, PARTS: tl.constexpr, DIM: tl.constexpr, DK: tl.constexpr, VDIM: tl.constexpr, DV: tl.constexpr,
    MAP: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Compute dq of one query block, and its R (B, H, nq, D, Dv) and r (B, H, nq, D)."""
    program = tl.program_id(0)
    block = program % blocks
    head = (program // blocks).to(tl.int64)
    b, hd = head // heads, head % heads
    given, given_total = block_sums(h, z, head // ratio, block, h_h, h_i, z_h, z_i, DIM, DK, VDIM, DV)
    acc = tl.zeros([DK, DV], tl.float32)
    total = tl.zeros([DK], tl.float32)
    for part in range(PARTS):
        rows = (block * PARTS + part) * BM + tl.arange(0, BM)
        x = rows_of(q + b * q_b + hd * q_h, rows, q_s, q_len, 0, DK, DIM, True).to(tl.float32)
        y = rows_of(out + b * o_b + hd * o_h, rows, o_s, q_len, 0, DV, VDIM, True).to(tl.float32)
        dy = rows_of(grad + b * g_b + hd * g_h, rows, g_s, q_len, 0, DV, VDIM, True)
        f = features(x, DIM, DK, MAP)
        inverse = inverse_of(f, given_total)
        spent = tl.sum(dy.to(tl.float32) * y, 1)
        df = product(dy, tl.trans(given.to(dy.dtype)), PRECISION, UPCAST) - spent[:, None] * given_total[None, :]
        dx = feature_gradients(x, f, df * inverse[:, None], MAP)
        store_rows(dq + b * dq_b + hd * dq_h, rows, dq_s, q_len, dx, 0, DK, DIM)
        u = tl.where((rows < q_len)[:, None], f * inverse[:, None], 0.0)
        acc += product(tl.trans(u.to(dy.dtype)), dy, PRECISION, UPCAST)
        total += tl.sum(u * spent[:, None], 0)
    place = program.to(tl.int64)
    channels = tl.arange(0, DK)
    store_rows(sums + place * (DIM * VDIM), channels, VDIM, DIM, acc, 0, DV, VDIM)
    tl.store(totals + place * DIM + channels, total, mask=channels < DIM)


@triton.jit(do_not_specialize=["kv_len"])
def key_gradients_kernel(
    k, v, weight, h, z, dk, dv,
    k_b, k_s, k_h, v_b, v_s, v_h, dk_b, dk_s, dk_h, dv_b, dv_s, dv_h, w_b, w_h, h_h, h_i, z_h, z_i,
    heads, blocks, kv_len,
    BN: tl.constexpr, PARTS: tl.constexpr, DIM: tl.constexpr, DK: tl.constexpr, VDIM: tl.constexpr, DV: tl.constexpr,
    MAP: tl.constexpr, WEIGHT: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Compute dk and dv of one key block from its G and t, given as h and z."""
    program = tl.program_id(0)
    block = program % blocks
    head = (program // blocks).to(tl.int64)
    b, hd = head // heads, head % heads
    sums, total = block_sums(h, z, head, block, h_h, h_i, z_h, z_i, DIM, DK, VDIM, DV)
    for part in range(PARTS):
        rows = (block * PARTS + part) * BN + tl.arange(0, BN)
        x, g, w, y = key_features(
            k + b * k_b + hd * k_h, v + b * v_b + hd * v_h, weight + b * w_b + hd * w_h, rows, k_s, v_s, kv_len,
            DIM, DK, VDIM, DV, MAP, WEIGHT,
        )  # fmt: skip
        dg = (product(y, tl.trans(sums.to(y.dtype)), PRECISION, UPCAST) - total[None, :]) * w[:, None]
        store_rows(
            dk + b * dk_b + hd * dk_h, rows, dk_s, kv_len, feature_gradients(x, g, dg, MAP), 0, DK, DIM
        )  # fmt: skip
        dy = product((g * w[:, None]).to(sums.dtype), sums, PRECISION, UPCAST)
        store_rows(dv + b * dv_b + hd * dv_h, rows, dv_s, kv_len, dy, 0, DV, VDIM)
