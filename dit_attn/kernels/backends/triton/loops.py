"""The loops of the forward kernel: over full key blocks, over those that need masks, and over pooled keys.

Blocks that need no mask run in a loop without masks: ragged tails and element masks are left to a second, short loop.
Logits are in base 2: ``p = exp2(s * scale * log2(e) - m)``.

With ``LAZY`` the maximum ``m`` of the first key tile stays the reference of the row, and neither full blocks nor pooled
keys have a maximum or a rescaled accumulator; see :mod:`dit_attn.kernels.backends.triton.forward`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dit_attn.kernels.backends.triton.tiles import (
    LOG2E,
    bit_words,
    block_rows,
    element_allowed,
    list_entry,
    low_rank,
    product,
    rows_of,
)


@triton.jit
def softmax_step(s, m, l, EDGE: tl.constexpr):
    """Update an online softmax by base-2 logits: (p, factor of the earlier sums, new maximum, new sum)."""
    top = tl.maximum(m, tl.max(s, 1))
    if EDGE:  # a row may have had no key yet
        safe = tl.where(top == float("-inf"), 0.0, top)
    else:
        safe = top
    p = tl.exp2(s - safe[:, None])
    shrink = tl.exp2(m - safe)
    return p, shrink, top, l * shrink + tl.sum(p, 1)


@triton.jit
def plain_step(s, c, m, l):
    """Update it by unscaled, unmasked logits: scale and maximum in one multiply-add. Needs c > 0."""
    top = tl.maximum(m, tl.max(s, 1) * c)
    p = tl.exp2(s * c - top[:, None])
    shrink = tl.exp2(m - top)
    return p, shrink, top, l * shrink + tl.sum(p, 1)


@triton.jit
def full_blocks(
    q1, q2, extra_q, acc1, acc2, m, l, c, list_base, kcap, steps,
    k_base, k_s, k_desc, v_base, v_s, v_desc, mask_base, bias_base, rank_base,
    BN: tl.constexpr, KV_SPLIT: tl.constexpr, DIM: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    KEY_MASK: tl.constexpr, KEY_BIAS: tl.constexpr, RANK: tl.constexpr, LAZY: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, INTERPRET: tl.constexpr, TMA: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Attend to ``steps`` tiles of BN keys without element masks, from the first of a list on: (acc1, acc2, m, l)."""
    columns = tl.arange(0, BN)
    ranks = tl.arange(0, 16)
    k_offsets = columns.to(tl.int64) * k_s
    v_offsets = columns.to(tl.int64) * v_s
    for step in tl.range(0, steps, num_stages=STAGES):
        block = list_entry(list_base + tl.minimum(step // KV_SPLIT, kcap - 1), INTERPRET)
        start = block * (BN * KV_SPLIT) + (step % KV_SPLIT) * BN
        if TMA:
            k1 = k_desc.load([start, 0])
        else:
            k1 = block_rows(k_base, start, k_s, k_offsets, 0, D1, DIM)
        s = product(q1, tl.trans(k1), PRECISION, UPCAST)
        if D2 > 0:
            k2 = block_rows(k_base, start, k_s, k_offsets, D1, D2, DIM)
            s += product(q2, tl.trans(k2), PRECISION, UPCAST)
        if LAZY:
            if step == 0:
                m = tl.max(s, 1) * c
            p = tl.exp2(s * c - m[:, None])
            l += tl.sum(p, 1)
        elif KEY_BIAS or KEY_MASK or RANK > 0:
            keys = start + columns
            s = s * c
            if RANK > 0:
                pointers = rank_base + keys[:, None].to(tl.int64) * RANK + ranks[None, :]
                extra_k = tl.load(pointers, mask=ranks[None, :] < RANK, other=0.0)
                s += low_rank(extra_q, extra_k)
            if KEY_BIAS:
                s += tl.load(bias_base + keys)[None, :] * LOG2E
            if KEY_MASK:
                exists = tl.load(mask_base + keys) != 0
                s = tl.where(exists[None, :], s, float("-inf"))
            p, shrink, m, l = softmax_step(s, m, l, True)
        else:
            p, shrink, m, l = plain_step(s, c, m, l)
        if TMA:
            v1 = v_desc.load([start, 0])
        else:
            v1 = block_rows(v_base, start, v_s, v_offsets, 0, D1, DIM)
        if KEY_MASK:
            v1 = tl.where(exists[:, None], v1, 0.0)
        if not LAZY:
            acc1 = acc1 * shrink[:, None]
        acc1 += product(p.to(v1.dtype), v1, PRECISION, UPCAST)
        if D2 > 0:
            v2 = block_rows(v_base, start, v_s, v_offsets, D1, D2, DIM)
            if KEY_MASK:
                v2 = tl.where(exists[:, None], v2, 0.0)
            if not LAZY:
                acc2 = acc2 * shrink[:, None]
            acc2 += product(p.to(v2.dtype), v2, PRECISION, UPCAST)
    return acc1, acc2, m, l


@triton.jit
def edge_blocks(
    q1, q2, extra_q, acc1, acc2, m, l, c, list_base, plain, full, count, limit, rows, row, b, h,
    k_base, k_s, v_base, v_s, mask_base, bias_base, rank_base, ma, mb, ma_b, ma_h, mb_b, n0, n1, n2, n3, q_len, kv_len,
    BM: tl.constexpr, BN: tl.constexpr, EN: tl.constexpr, Q_SPLIT: tl.constexpr, KV_SPLIT: tl.constexpr,
    DIM: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    ELEMENTS: tl.constexpr, KEY_MASK: tl.constexpr, KEY_BIAS: tl.constexpr, RANK: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Attend to entries ``plain .. count`` of a list, of which those from ``full`` on have an element mask."""
    parts = BN * KV_SPLIT // EN
    narrow = tl.arange(0, EN)
    ranks = tl.arange(0, 16)
    for step in tl.range(plain * parts, count * parts, num_stages=STAGES):
        entry = step // parts
        keys = tl.load(list_base + entry) * (BN * KV_SPLIT) + (step % parts) * EN + narrow
        k1 = rows_of(k_base, keys, k_s, kv_len, 0, D1, DIM, True)
        s = product(q1, tl.trans(k1), PRECISION, UPCAST)
        if D2 > 0:
            k2 = rows_of(k_base, keys, k_s, kv_len, D1, D2, DIM, True)
            s += product(q2, tl.trans(k2), PRECISION, UPCAST)
        s = s * c
        exists = keys < limit
        if KEY_MASK:
            exists = exists & (tl.load(mask_base + keys, mask=keys < kv_len, other=0) != 0)
        attended = exists[None, :]
        if ELEMENTS > 0:
            bits_row = ma
            if ELEMENTS == 4:
                bits_row = bit_words(
                    ma, b, h, ma_b, ma_h, row, tl.maximum(entry - full, 0), (rows % (BM * Q_SPLIT))[:, None], n0,
                    BM * Q_SPLIT, BN * KV_SPLIT,
                )  # fmt: skip
            elif ELEMENTS == 3:
                bits_row = ma + b * ma_b
            q_tokens = tl.minimum(rows, q_len - 1)[:, None]
            k_tokens = tl.minimum(keys, kv_len - 1)[None, :]
            allowed = element_allowed(
                q_tokens, k_tokens, bits_row, mb + b * mb_b, bits_row,
                ((step % parts) * EN + narrow)[None, :], ELEMENTS, n0, n1, n2, n3,
            )  # fmt: skip
            attended = attended & (allowed | (entry < full))
        if RANK > 0:
            extra_k = tl.load(
                rank_base + keys[:, None].to(tl.int64) * RANK + ranks[None, :],
                mask=(keys[:, None] < kv_len) & (ranks[None, :] < RANK), other=0.0,
            )  # fmt: skip
            s += low_rank(extra_q, extra_k)
        if KEY_BIAS:
            s += tl.load(bias_base + keys, mask=keys < kv_len, other=0.0)[None, :] * LOG2E
        s = tl.where(attended, s, float("-inf"))
        p, shrink, m, l = softmax_step(s, m, l, True)
        v1 = tl.where(exists[:, None], rows_of(v_base, keys, v_s, kv_len, 0, D1, DIM, True), 0.0)
        acc1 = acc1 * shrink[:, None] + product(p.to(v1.dtype), v1, PRECISION, UPCAST)
        if D2 > 0:
            v2 = tl.where(exists[:, None], rows_of(v_base, keys, v_s, kv_len, D1, D2, DIM, True), 0.0)
            acc2 = acc2 * shrink[:, None] + product(p.to(v2.dtype), v2, PRECISION, UPCAST)
    return acc1, acc2, m, l


@triton.jit
def is_chosen(bits, words, first, BV: tl.constexpr, PER_BLOCK: tl.constexpr):
    """Tell for pooled keys ``first .. first + BV`` whether their blocks are among ``bits``; (BV,) bool."""
    BLOCKS: tl.constexpr = BV // PER_BLOCK
    columns = tl.arange(0, BV)
    if BLOCKS * PER_BLOCK == BV and (32 % BLOCKS == 0 or BLOCKS == 64):  # one or two words for all of them
        start = first // PER_BLOCK
        own = columns // PER_BLOCK
        word = tl.load(bits + tl.minimum(start // 32, words - 1)) >> (start % 32)
        if BLOCKS == 64:
            word = tl.where(own < 32, word, tl.load(bits + tl.minimum(start // 32 + 1, words - 1)))
        return ((word >> (own % 32)) & 1) != 0
    home = (first + columns) // PER_BLOCK
    return ((tl.load(bits + tl.minimum(home // 32, words - 1)) >> (home % 32)) & 1) != 0


@triton.jit
def pooled_keys(
    q1, q2, extra_q, acc1, acc2, m, l, c, scale, var_cap, chosen, words, pooled, nv,
    k_base, v_base, variance_base, weight_base, rank_base,
    BV: tl.constexpr, PER_BLOCK: tl.constexpr, DIM: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    VARIANCE: tl.constexpr, RANK: tl.constexpr, LAZY: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Attend to the first ``pooled`` of ``nv`` pooled keys, but for those of ``chosen`` blocks, one bit a block."""
    ranks = tl.arange(0, 16)
    if VARIANCE:
        before, after = 1.0, 0.5 * scale * scale
        if q1.dtype == tl.float16:  # its maximum is 65504: squares of queries above 255 are scaled first
            before, after = after, before
        qq1 = (q1.to(tl.float32) * q1.to(tl.float32) * before).to(q1.dtype)
        if D2 > 0:
            qq2 = (q2.to(tl.float32) * q2.to(tl.float32) * before).to(q2.dtype)
    for first in tl.range(0, pooled, BV, num_stages=STAGES):
        places = first + tl.arange(0, BV)
        # Weight and mask of a pooled key are one number, so that a logit takes one multiply-add.
        weight = tl.load(weight_base + places)  # in base 2, -inf from nv on
        weight = tl.where(is_chosen(chosen, words, first, BV, PER_BLOCK), float("-inf"), weight)
        k1 = rows_of(k_base, places, DIM, nv, 0, D1, DIM, True)
        s = product(q1, tl.trans(k1), PRECISION, UPCAST)
        if D2 > 0:
            k2 = rows_of(k_base, places, DIM, nv, D1, D2, DIM, True)
            s += product(q2, tl.trans(k2), PRECISION, UPCAST)
        s = s * c + weight[None, :]
        if VARIANCE:
            w1 = rows_of(variance_base, places, DIM, nv, 0, D1, DIM, True)
            variance = product(qq1, tl.trans(w1), PRECISION, UPCAST)
            if D2 > 0:
                w2 = rows_of(variance_base, places, DIM, nv, D1, D2, DIM, True)
                variance += product(qq2, tl.trans(w2), PRECISION, UPCAST)
            s += tl.minimum(variance * after, var_cap) * LOG2E
        if RANK > 0:
            extra_k = tl.load(
                rank_base + places[:, None].to(tl.int64) * RANK + ranks[None, :],
                mask=(places[:, None] < nv) & (ranks[None, :] < RANK), other=0.0,
            )  # fmt: skip
            s += low_rank(extra_q, extra_k)
        if LAZY:
            p = tl.exp2(s - m[:, None])
            l += tl.sum(p, 1)
        else:
            p, shrink, m, l = softmax_step(s, m, l, True)
            acc1 = acc1 * shrink[:, None]
            if D2 > 0:
                acc2 = acc2 * shrink[:, None]
        v1 = rows_of(v_base, places, DIM, nv, 0, D1, DIM, True)
        acc1 += product(p.to(v1.dtype), v1, PRECISION, UPCAST)
        if D2 > 0:
            v2 = rows_of(v_base, places, DIM, nv, D1, D2, DIM, True)
            acc2 += product(p.to(v2.dtype), v2, PRECISION, UPCAST)
    return acc1, acc2, m, l
