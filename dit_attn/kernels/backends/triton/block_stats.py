"""What every key block contributes to exact attention, in Triton: a second pass after the forward kernel.

One program per query tile and one loop over all key blocks. The log-sum-exp and the output of the rows are known, so
that no running maximum is needed; the part of the output that comes from a block is summed in registers, and what is
stored of it is one number: the softmax mass of the block, or the squared change of the output without it, summed over
the rows of the tile. The formulas are in :mod:`dit_attn.kernels.block_stats`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dit_attn.kernels.backends.triton.tiles import LOG2E, product, rows_of


@triton.jit
def add_keys(
    q1, q2, part1, part2, mass, m, empty, c, start, k_base, k_s, v_base, v_s, mask_base, bias_base, kv_len,
    BN: tl.constexpr, DIM: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    KEY_MASK: tl.constexpr, KEY_BIAS: tl.constexpr, ERROR: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Add the softmax weights of BN keys, and the values times them: (part1, part2, mass)."""
    keys = start + tl.arange(0, BN)
    exists = keys < kv_len
    k1 = rows_of(k_base, keys, k_s, kv_len, 0, D1, DIM, True)
    s = product(q1, tl.trans(k1), PRECISION, UPCAST)
    if D2 > 0:
        k2 = rows_of(k_base, keys, k_s, kv_len, D1, D2, DIM, True)
        s += product(q2, tl.trans(k2), PRECISION, UPCAST)
    s = s * c
    if KEY_BIAS:
        s += (tl.load(bias_base + keys, mask=exists, other=0.0) * LOG2E)[None, :]
    if KEY_MASK:
        exists = exists & (tl.load(mask_base + keys, mask=exists, other=0) != 0)
    p = tl.exp2(tl.where(exists[None, :] & ~empty[:, None], s - m[:, None], float("-inf")))
    mass += tl.sum(p, 1)
    if ERROR:
        v1 = rows_of(v_base, keys, v_s, kv_len, 0, D1, DIM, True)
        part1 += product(p.to(v1.dtype), v1, PRECISION, UPCAST)
        if D2 > 0:
            v2 = rows_of(v_base, keys, v_s, kv_len, D1, D2, DIM, True)
            part2 += product(p.to(v2.dtype), v2, PRECISION, UPCAST)
    return part1, part2, mass


@triton.jit
def squared_change(part, mass, o_base, rows, o_s, q_len, FIRST: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr):
    """Sum of squares of ``part - mass * output`` (BM,) over some channels."""
    out = rows_of(o_base, rows, o_s, q_len, FIRST, WIDTH, DIM, True).to(tl.float32)
    change = part - mass[:, None] * out
    return tl.sum(change * change, 1)


@triton.jit(do_not_specialize=["q_len", "kv_len", "nk", "nv", "tiles"])
def block_stats_kernel(
    q, k, v, o, lse, stats,
    key_mask, key_bias, comp_k, comp_v, comp_bias,
    scale,
    q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h, o_b, o_s, o_h,
    km_b, kb_b, kb_h, cb_b, cb_h,
    heads, ratio, tiles, q_len, kv_len, nk, nv,
    BM: tl.constexpr, BN: tl.constexpr, BV: tl.constexpr, KV_SPLIT: tl.constexpr, PER_BLOCK: tl.constexpr,
    UNIT: tl.constexpr, DIM: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    KEY_MASK: tl.constexpr, KEY_BIAS: tl.constexpr, ERROR: tl.constexpr, POOLED: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Store (B, H, tiles, nk): of every query tile and key block. Strides are in units, as for the forward kernel."""
    program = tl.program_id(0)
    tile = program % tiles
    h = (program // tiles) % heads
    b = (program // tiles) // heads
    rows = tile * BM + tl.arange(0, BM)
    there = rows < q_len
    b64, h64, hk64 = b.to(tl.int64), h.to(tl.int64), (h // ratio).to(tl.int64)
    q_base = q + (b64 * q_b + h64 * q_h) * UNIT
    k_base = k + (b64 * k_b + hk64 * k_h) * UNIT
    v_base = v + (b64 * v_b + hk64 * v_h) * UNIT
    o_base = o + (b64 * o_b + h64 * o_h) * UNIT
    q_s, k_s, v_s, o_s = q_s * UNIT, k_s * UNIT, v_s * UNIT, o_s * UNIT
    stats_base = stats + ((b64 * heads + h64) * tiles + tile) * nk
    q1 = rows_of(q_base, rows, q_s, q_len, 0, D1, DIM, True)
    q2 = q1
    if D2 > 0:
        q2 = rows_of(q_base, rows, q_s, q_len, D1, D2, DIM, True)
    c = scale * LOG2E
    whole = tl.load(lse + (b64 * heads + h64) * q_len + rows, mask=there, other=float("-inf"))
    empty = whole == float("-inf")  # of rows without a key, and of those that are not there
    m = tl.where(empty, 0.0, whole * LOG2E)
    mask_base, bias_base = k_base, k_base
    if KEY_MASK:
        mask_base = key_mask + b64 * km_b
    if KEY_BIAS:
        bias_base = key_bias + b64 * kb_b + h64 * kb_h
    pooled_head = (b64 * (heads // ratio) + hk64) * nv * DIM

    for block in tl.range(0, nk):
        mass = tl.zeros([BM], tl.float32)
        part1 = tl.zeros([BM, D1], tl.float32)
        part2 = part1
        if D2 > 0:
            part2 = tl.zeros([BM, D2], tl.float32)
        if KV_SPLIT == 1:  # the loop over blocks is the innermost one, which the compiler overlaps with its loads
            part1, part2, mass = add_keys(
                q1, q2, part1, part2, mass, m, empty, c, block * BN, k_base, k_s, v_base, v_s, mask_base, bias_base,
                kv_len, BN, DIM, D1, D2, KEY_MASK, KEY_BIAS, ERROR, PRECISION, UPCAST,
            )  # fmt: skip
        else:
            for step in tl.range(0, KV_SPLIT):
                part1, part2, mass = add_keys(
                    q1, q2, part1, part2, mass, m, empty, c, (block * KV_SPLIT + step) * BN, k_base, k_s, v_base, v_s,
                    mask_base, bias_base, kv_len, BN, DIM, D1, D2, KEY_MASK, KEY_BIAS, ERROR, PRECISION, UPCAST,
                )  # fmt: skip
        if POOLED:
            own = tl.arange(0, BV)
            places = block * PER_BLOCK + own
            known = (own < PER_BLOCK) & (places < nv)
            weight = tl.load(comp_bias + b64 * cb_b + h64 * cb_h + places, mask=known, other=float("-inf"))
            c1 = rows_of(comp_k + pooled_head, places, DIM, nv, 0, D1, DIM, True)
            s = product(q1, tl.trans(c1), PRECISION, UPCAST)
            if D2 > 0:
                c2 = rows_of(comp_k + pooled_head, places, DIM, nv, D1, D2, DIM, True)
                s += product(q2, tl.trans(c2), PRECISION, UPCAST)
            p = tl.exp2(tl.where(empty[:, None], float("-inf"), s * c + weight[None, :] - m[:, None]))
            mass -= tl.sum(p, 1)
            w1 = rows_of(comp_v + pooled_head, places, DIM, nv, 0, D1, DIM, True)
            part1 -= product(p.to(w1.dtype), w1, PRECISION, UPCAST)
            if D2 > 0:
                w2 = rows_of(comp_v + pooled_head, places, DIM, nv, D1, D2, DIM, True)
                part2 -= product(p.to(w2.dtype), w2, PRECISION, UPCAST)
        if ERROR:
            each = squared_change(part1, mass, o_base, rows, o_s, q_len, 0, D1, DIM)
            if D2 > 0:
                each += squared_change(part2, mass, o_base, rows, o_s, q_len, D1, D2, DIM)
        else:
            each = mass
        tl.store(stats_base + block, tl.sum(tl.where(there, each, 0.0), 0))
