"""The loops of the backward kernels: full blocks without masks, then the few entries of a list that need masks.

Logits are in base 2: ``p = exp2(s * scale * log2(e) - lse)``. Gradients of keys come from the transposed logits, whose
layout in registers is that of an operand of the next products: nothing passes through shared memory on the way.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dit_attn.kernels.backends.triton.tiles import (
    LOG2E,
    add_product,
    bit_words,
    block_rows,
    element_allowed,
    list_entry,
    product,
    rows_of,
)


@triton.jit
def dq_full_blocks(
    q1, q2, g1, g2, acc1, acc2, logs, delta, c, list_base, kcap, steps, k_base, k_s, v_base, v_s, mask_base, bias_base,
    BN: tl.constexpr, KV_SPLIT: tl.constexpr, DIM: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    KEY_MASK: tl.constexpr, KEY_BIAS: tl.constexpr, FOLD: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, INTERPRET: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Add the gradient through ``steps`` tiles of BN keys, from the first of a list on: (acc1, acc2).

    With ``FOLD`` a product starts from ``-delta`` instead of zero, which is free where its sums are in registers.
    """
    columns = tl.arange(0, BN)
    k_offsets, v_offsets = columns.to(tl.int64) * k_s, columns.to(tl.int64) * v_s
    for step in tl.range(0, steps, num_stages=STAGES):
        block = list_entry(list_base + tl.minimum(step // KV_SPLIT, kcap - 1), INTERPRET)
        start = block * (BN * KV_SPLIT) + (step % KV_SPLIT) * BN
        k1 = block_rows(k_base, start, k_s, k_offsets, 0, D1, DIM)
        v1 = block_rows(v_base, start, v_s, v_offsets, 0, D1, DIM)
        if KEY_MASK:
            exists = tl.load(mask_base + start + columns) != 0
            k1, v1 = tl.where(exists[:, None], k1, 0.0), tl.where(exists[:, None], v1, 0.0)
        s = product(q1, tl.trans(k1), PRECISION, UPCAST)
        if FOLD:
            dp = add_product(-delta[:, None], g1, tl.trans(v1), PRECISION, UPCAST)
        else:
            dp = product(g1, tl.trans(v1), PRECISION, UPCAST)
        if D2 > 0:
            k2 = block_rows(k_base, start, k_s, k_offsets, D1, D2, DIM)
            v2 = block_rows(v_base, start, v_s, v_offsets, D1, D2, DIM)
            if KEY_MASK:
                k2, v2 = tl.where(exists[:, None], k2, 0.0), tl.where(exists[:, None], v2, 0.0)
            s += product(q2, tl.trans(k2), PRECISION, UPCAST)
            dp += product(g2, tl.trans(v2), PRECISION, UPCAST)
        s = s * c
        if KEY_BIAS:
            s += tl.load(bias_base + start + columns)[None, :] * LOG2E
        if KEY_MASK:
            s = tl.where(exists[None, :], s, float("-inf"))
        if not FOLD:
            dp -= delta[:, None]
        ds = tl.exp2(s - logs[:, None]) * dp
        acc1 += product(ds.to(k1.dtype), k1, PRECISION, UPCAST)
        if D2 > 0:
            acc2 += product(ds.to(k2.dtype), k2, PRECISION, UPCAST)
    return acc1, acc2


@triton.jit
def dq_edge_blocks(
    q1, q2, g1, g2, acc1, acc2, logs, delta, c, list_base, plain, full, count, rows, row, b, h,
    k_base, k_s, v_base, v_s, mask_base, bias_base, ma, mb, ma_b, ma_h, mb_b, n0, n1, n2, n3, q_len, kv_len,
    BM: tl.constexpr, BN: tl.constexpr, EN: tl.constexpr, Q_SPLIT: tl.constexpr, KV_SPLIT: tl.constexpr,
    DIM: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    ELEMENTS: tl.constexpr, KEY_MASK: tl.constexpr, KEY_BIAS: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Add that of entries ``plain .. count`` of a list, of which those from ``full`` on have an element mask."""
    parts = BN * KV_SPLIT // EN
    narrow = tl.arange(0, EN)
    for step in tl.range(plain * parts, count * parts, num_stages=STAGES):
        entry = step // parts
        keys = tl.load(list_base + entry) * (BN * KV_SPLIT) + (step % parts) * EN + narrow
        attended = (keys < kv_len)[None, :] & (rows < q_len)[:, None]
        if KEY_MASK:
            attended = attended & (tl.load(mask_base + keys, mask=keys < kv_len, other=0) != 0)[None, :]
        if ELEMENTS > 0:
            bits_row = ma + b * ma_b
            if ELEMENTS == 4:
                bits_row = bit_words(
                    ma, b, h, ma_b, ma_h, row, tl.maximum(entry - full, 0), (rows % (BM * Q_SPLIT))[:, None], n0,
                    BM * Q_SPLIT, BN * KV_SPLIT,
                )  # fmt: skip
            allowed = element_allowed(
                tl.minimum(rows, q_len - 1)[:, None], tl.minimum(keys, kv_len - 1)[None, :],
                ma + b * ma_b, mb + b * mb_b, bits_row, ((step % parts) * EN + narrow)[None, :],
                ELEMENTS, n0, n1, n2, n3,
            )  # fmt: skip
            attended = attended & (allowed | (entry < full))
        used = (tl.max(attended.to(tl.int32), 0) != 0)[:, None]
        k1 = tl.where(used, rows_of(k_base, keys, k_s, kv_len, 0, D1, DIM, True), 0.0)
        v1 = tl.where(used, rows_of(v_base, keys, v_s, kv_len, 0, D1, DIM, True), 0.0)
        s = product(q1, tl.trans(k1), PRECISION, UPCAST)
        dp = product(g1, tl.trans(v1), PRECISION, UPCAST)
        if D2 > 0:
            k2 = tl.where(used, rows_of(k_base, keys, k_s, kv_len, D1, D2, DIM, True), 0.0)
            v2 = tl.where(used, rows_of(v_base, keys, v_s, kv_len, D1, D2, DIM, True), 0.0)
            s += product(q2, tl.trans(k2), PRECISION, UPCAST)
            dp += product(g2, tl.trans(v2), PRECISION, UPCAST)
        s = s * c
        if KEY_BIAS:
            s += tl.load(bias_base + keys, mask=keys < kv_len, other=0.0)[None, :] * LOG2E
        p = tl.where(attended, tl.exp2(s - logs[:, None]), 0.0)
        ds = p * (dp - delta[:, None])
        acc1 += product(ds.to(k1.dtype), k1, PRECISION, UPCAST)
        if D2 > 0:
            acc2 += product(ds.to(k2.dtype), k2, PRECISION, UPCAST)
    return acc1, acc2


@triton.jit
def dkv_full_blocks(
    k1, k2, v1, v2, dk1, dk2, dv1, dv2, dbias, bias, c, list_base, qcap, steps, q_base, q_s, g_base, g_s, logs, delta,
    BM: tl.constexpr, Q_SPLIT: tl.constexpr, DIM: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    KEY_BIAS: tl.constexpr, BIAS_GRAD: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, INTERPRET: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Add the gradients through ``steps`` tiles of BM queries, from the first of a list on.

    Keys that do not exist get gradients too, which are not written. Returns (dk1, dk2, dv1, dv2, dbias).
    """
    places = tl.arange(0, BM)
    q_offsets, g_offsets = places.to(tl.int64) * q_s, places.to(tl.int64) * g_s
    for step in tl.range(0, steps, num_stages=STAGES):
        block = list_entry(list_base + tl.minimum(step // Q_SPLIT, qcap - 1), INTERPRET)
        start = block * (BM * Q_SPLIT) + (step % Q_SPLIT) * BM
        q1 = block_rows(q_base, start, q_s, q_offsets, 0, D1, DIM)
        g1 = block_rows(g_base, start, g_s, g_offsets, 0, D1, DIM)
        s = product(k1, tl.trans(q1), PRECISION, UPCAST)
        dp = product(v1, tl.trans(g1), PRECISION, UPCAST)
        if D2 > 0:
            q2 = block_rows(q_base, start, q_s, q_offsets, D1, D2, DIM)
            g2 = block_rows(g_base, start, g_s, g_offsets, D1, D2, DIM)
            s += product(k2, tl.trans(q2), PRECISION, UPCAST)
            dp += product(v2, tl.trans(g2), PRECISION, UPCAST)
        s = s * c
        if KEY_BIAS:
            s += bias[:, None]
        p = tl.exp2(s - tl.load(logs + start + places)[None, :])
        ds = p * (dp - tl.load(delta + start + places)[None, :])
        dv1 += product(p.to(g1.dtype), g1, PRECISION, UPCAST)
        dk1 += product(ds.to(q1.dtype), q1, PRECISION, UPCAST)
        if D2 > 0:
            dv2 += product(p.to(g2.dtype), g2, PRECISION, UPCAST)
            dk2 += product(ds.to(q2.dtype), q2, PRECISION, UPCAST)
        if BIAS_GRAD:
            dbias += tl.sum(ds, 1)
    return dk1, dk2, dv1, dv2, dbias


@triton.jit
def dkv_edge_blocks(
    k1, k2, v1, v2, dk1, dk2, dv1, dv2, dbias, bias, c, list_base, entries, plain, full, count, keys, exists, b, h,
    q_base, q_s, g_base, g_s, logs, delta, ma, mb, ma_b, ma_h, mb_b, n0, n1, n2, n3, q_len, kv_len,
    BM: tl.constexpr, BN: tl.constexpr, EM: tl.constexpr, Q_SPLIT: tl.constexpr, KV_SPLIT: tl.constexpr,
    DIM: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    ELEMENTS: tl.constexpr, KEY_BIAS: tl.constexpr, BIAS_GRAD: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Add those of entries ``plain .. count`` of a list, of which those from ``full`` on have an element mask."""
    parts = BM * Q_SPLIT // EM
    narrow = tl.arange(0, EM)
    for step in tl.range(plain * parts, count * parts, num_stages=STAGES):
        entry = step // parts
        block = tl.load(list_base + entry)
        rows = block * (BM * Q_SPLIT) + (step % parts) * EM + narrow
        q1 = rows_of(q_base, rows, q_s, q_len, 0, D1, DIM, True)
        g1 = rows_of(g_base, rows, g_s, q_len, 0, D1, DIM, True)
        s = product(k1, tl.trans(q1), PRECISION, UPCAST)
        dp = product(v1, tl.trans(g1), PRECISION, UPCAST)
        if D2 > 0:
            q2 = rows_of(q_base, rows, q_s, q_len, D1, D2, DIM, True)
            g2 = rows_of(g_base, rows, g_s, q_len, D1, D2, DIM, True)
            s += product(k2, tl.trans(q2), PRECISION, UPCAST)
            dp += product(v2, tl.trans(g2), PRECISION, UPCAST)
        attended = exists[:, None] & (rows < q_len)[None, :]
        if ELEMENTS > 0:
            bits_row = ma + b * ma_b
            if ELEMENTS == 4:
                bits_row = bit_words(
                    ma, b, h, ma_b, ma_h, block, tl.load(entries + entry), (rows % (BM * Q_SPLIT))[None, :], n0,
                    BM * Q_SPLIT, BN * KV_SPLIT,
                )  # fmt: skip
            allowed = element_allowed(
                tl.minimum(rows, q_len - 1)[None, :], tl.minimum(keys, kv_len - 1)[:, None],
                ma + b * ma_b, mb + b * mb_b, bits_row, (keys % (BN * KV_SPLIT))[:, None],
                ELEMENTS, n0, n1, n2, n3,
            )  # fmt: skip
            attended = attended & (allowed | (entry < full))
        s = s * c
        if KEY_BIAS:
            s += bias[:, None]
        p = tl.where(attended, tl.exp2(s - tl.load(logs + rows)[None, :]), 0.0)
        ds = tl.where(attended, p * (dp - tl.load(delta + rows)[None, :]), 0.0)
        dv1 += product(p.to(g1.dtype), g1, PRECISION, UPCAST)
        dk1 += product(ds.to(q1.dtype), q1, PRECISION, UPCAST)
        if D2 > 0:
            dv2 += product(p.to(g2.dtype), g2, PRECISION, UPCAST)
            dk2 += product(ds.to(q2.dtype), q2, PRECISION, UPCAST)
        if BIAS_GRAD:
            dbias += tl.sum(ds, 1)
    return dk1, dk2, dv1, dv2, dbias
