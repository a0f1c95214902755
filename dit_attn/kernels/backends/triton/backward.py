"""Gradients of block-sparse attention in Triton: dq over each query tile's list, dk and dv over the reverse lists.

Every output element is written by exactly one program, so there are no atomics and the result is the same in every run.
With ``p = exp(s - lse)`` and ``delta = rowsum(dO * O) - dlse``: ``ds = p * (dO v^T - delta)``, ``dq = scale * ds k``,
``dk = scale * ds^T q``, ``dv = p^T dO`` and ``dbias = colsum(ds)``. The loops are in
:mod:`~dit_attn.kernels.backends.triton.gradient_loops`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dit_attn.kernels.backends.triton.gradient_loops import (
    dkv_edge_blocks,
    dkv_full_blocks,
    dq_edge_blocks,
    dq_full_blocks,
)
from dit_attn.kernels.backends.triton.tiles import LOG2E, rows_of, store_rows


@triton.jit(do_not_specialize=["q_len", "padded"])
def row_kernel(
    out, grad, grad_lse, lse, logs, delta, o_b, o_s, o_h, g_b, g_s, g_h, l_b, l_h, l_s, heads, q_len, padded, tiles,
    BM: tl.constexpr, DIM: tl.constexpr, D: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Compute what the loops need of a row, fp32: its LSE in base 2 and delta = rowsum(grad * out) - grad_lse.

    Both are (B, H, padded), up to whole query blocks. Where a row has no key or does not exist the first is +inf, so
    that its p is 0 whatever the logit.
    """
    program = tl.program_id(0)
    rows = (program % tiles) * BM + tl.arange(0, BM)
    h = ((program // tiles) % heads).to(tl.int64)
    b = ((program // tiles) // heads).to(tl.int64)
    o = rows_of(out + (b * o_b + h * o_h) * UNIT, rows, o_s * UNIT, q_len, 0, D, DIM, True).to(tl.float32)
    g = rows_of(grad + (b * g_b + h * g_h) * UNIT, rows, g_s * UNIT, q_len, 0, D, DIM, True).to(tl.float32)
    inside = rows < q_len
    from_lse = tl.load(grad_lse + b * l_b + h * l_h + rows.to(tl.int64) * l_s, mask=inside, other=0.0)
    natural = tl.load(lse + (b * heads + h) * q_len + rows, mask=inside, other=float("-inf"))
    base = (b * heads + h) * padded + rows
    tl.store(logs + base, tl.where(natural == float("-inf"), float("inf"), natural * LOG2E), mask=rows < padded)
    tl.store(delta + base, tl.sum(o * g, 1) - from_lse, mask=rows < padded)


@triton.jit(
    do_not_specialize=[
        "q_len", "kv_len", "padded", "kcap", "tiles", "i_b", "i_h", "c_b", "c_h", "ma_b", "ma_h",
        "n0", "n1", "n2", "n3",
    ]
)  # fmt: skip
def dq_kernel(
    q, k, v, grad, dq, logs, delta, kv_indices, kv_num_blocks, full_kv_num_blocks, key_mask, key_bias, ma, mb, scale,
    q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h, g_b, g_s, g_h, dq_b, dq_s, dq_h,
    i_b, i_h, c_b, c_h, km_b, kb_b, kb_h, ma_b, ma_h, mb_b,
    heads, ratio, tiles, q_len, kv_len, padded, kcap,
    n0, n1, n2, n3,
    BM: tl.constexpr, BN: tl.constexpr, EN: tl.constexpr, Q_SPLIT: tl.constexpr, KV_SPLIT: tl.constexpr,
    UNIT: tl.constexpr, DIM: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    RAGGED: tl.constexpr, ELEMENTS: tl.constexpr, KEY_MASK: tl.constexpr, KEY_BIAS: tl.constexpr,
    FOLD: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, INTERPRET: tl.constexpr,
    STAGES: tl.constexpr, EDGE_STAGES: tl.constexpr,
):  # fmt: skip
    """Compute dq of one query tile."""
    program = tl.program_id(0)
    tile = program % tiles
    h = (program // tiles) % heads
    b = (program // tiles) // heads
    row = tile // Q_SPLIT
    rows = tile * BM + tl.arange(0, BM)
    b64, h64, hk64 = b.to(tl.int64), h.to(tl.int64), (h // ratio).to(tl.int64)
    k_base = k + (b64 * k_b + hk64 * k_h) * UNIT
    v_base = v + (b64 * v_b + hk64 * v_h) * UNIT
    q_s, k_s, v_s, g_s, dq_s = q_s * UNIT, k_s * UNIT, v_s * UNIT, g_s * UNIT, dq_s * UNIT
    list_base = kv_indices + b64 * i_b + h64 * i_h + row.to(tl.int64) * kcap
    state = b64 * c_b + h64 * c_h + row

    q_base, g_base = q + (b64 * q_b + h64 * q_h) * UNIT, grad + (b64 * g_b + h64 * g_h) * UNIT
    q1, g1 = rows_of(q_base, rows, q_s, q_len, 0, D1, DIM, True), rows_of(g_base, rows, g_s, q_len, 0, D1, DIM, True)
    acc1 = tl.zeros([BM, D1], tl.float32)
    q2, g2, acc2 = q1, g1, acc1
    if D2 > 0:
        q2 = rows_of(q_base, rows, q_s, q_len, D1, D2, DIM, True)
        g2 = rows_of(g_base, rows, g_s, q_len, D1, D2, DIM, True)
        acc2 = tl.zeros([BM, D2], tl.float32)
    stats = (b64 * heads + h64) * padded + rows
    row_logs, row_delta = tl.load(logs + stats), tl.load(delta + stats)
    mask_base, bias_base = k_base, k_base
    if KEY_MASK:
        mask_base = key_mask + b64 * km_b
    if KEY_BIAS:
        bias_base = key_bias + b64 * kb_b + h64 * kb_h
    c = scale * LOG2E

    count = tl.load(kv_num_blocks + state)
    full = count
    if ELEMENTS > 0:
        full = tl.load(full_kv_num_blocks + state)
    plain = full
    if RAGGED:
        last = tl.load(list_base + tl.maximum(full - 1, 0), mask=full > 0, other=0)
        plain = full - ((full > 0) & ((last + 1) * (BN * KV_SPLIT) > kv_len)).to(tl.int32)

    acc1, acc2 = dq_full_blocks(
        q1, q2, g1, g2, acc1, acc2, row_logs, row_delta, c, list_base, kcap, plain * KV_SPLIT,
        k_base, k_s, v_base, v_s, mask_base, bias_base,
        BN, KV_SPLIT, DIM, D1, D2, KEY_MASK, KEY_BIAS, FOLD, PRECISION, UPCAST, INTERPRET, STAGES,
    )  # fmt: skip
    if RAGGED or ELEMENTS > 0:
        acc1, acc2 = dq_edge_blocks(
            q1, q2, g1, g2, acc1, acc2, row_logs, row_delta, c, list_base, plain, full, count, rows, row, b64, h64,
            k_base, k_s, v_base, v_s, mask_base, bias_base, ma, mb, ma_b, ma_h, mb_b, n0, n1, n2, n3, q_len, kv_len,
            BM, BN, EN, Q_SPLIT, KV_SPLIT, DIM, D1, D2, ELEMENTS, KEY_MASK, KEY_BIAS, PRECISION, UPCAST, EDGE_STAGES,
        )  # fmt: skip

    base = dq + (b64 * dq_b + h64 * dq_h) * UNIT
    store_rows(base, rows, dq_s, q_len, acc1 * scale, 0, D1, DIM)
    if D2 > 0:
        store_rows(base, rows, dq_s, q_len, acc2 * scale, D1, D2, DIM)


@triton.jit(
    do_not_specialize=[
        "q_len", "kv_len", "padded", "qcap", "tiles", "i_b", "i_h", "c_b", "c_h", "ma_b", "ma_h",
        "n0", "n1", "n2", "n3",
    ]
)  # fmt: skip
def dkv_kernel(
    q, k, v, grad, dk, dv, dbias, logs, delta, q_indices, q_num_blocks, full_q_num_blocks, entries,
    key_mask, key_bias, ma, mb, scale,
    q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h, g_b, g_s, g_h, dk_b, dk_s, dk_h, dv_b, dv_s, dv_h,
    i_b, i_h, c_b, c_h, km_b, kb_b, kb_h, ma_b, ma_h, mb_b,
    heads, ratio, tiles, q_len, kv_len, padded, qcap,
    n0, n1, n2, n3,
    BM: tl.constexpr, BN: tl.constexpr, EM: tl.constexpr, Q_SPLIT: tl.constexpr, KV_SPLIT: tl.constexpr,
    UNIT: tl.constexpr, DIM: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    RAGGED: tl.constexpr, ELEMENTS: tl.constexpr, KEY_MASK: tl.constexpr, KEY_BIAS: tl.constexpr,
    BIAS_GRAD: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, INTERPRET: tl.constexpr,
    STAGES: tl.constexpr, EDGE_STAGES: tl.constexpr,
):  # fmt: skip
    """Compute dk, dv (and dbias per query head) of one tile of keys, over all query heads that share them in turn."""
    program = tl.program_id(0)
    tile = program % tiles
    key_heads = heads // ratio
    hk = (program // tiles) % key_heads
    b = (program // tiles) // key_heads
    column = tile // KV_SPLIT
    keys = tile * BN + tl.arange(0, BN)
    b64, hk64 = b.to(tl.int64), hk.to(tl.int64)
    k_base, v_base = k + (b64 * k_b + hk64 * k_h) * UNIT, v + (b64 * v_b + hk64 * v_h) * UNIT
    q_s, k_s, v_s, g_s, dk_s, dv_s = q_s * UNIT, k_s * UNIT, v_s * UNIT, g_s * UNIT, dk_s * UNIT, dv_s * UNIT
    k1 = rows_of(k_base, keys, k_s, kv_len, 0, D1, DIM, True)
    v1 = rows_of(v_base, keys, v_s, kv_len, 0, D1, DIM, True)
    dk1, dv1 = tl.zeros([BN, D1], tl.float32), tl.zeros([BN, D1], tl.float32)
    k2, v2, dk2, dv2 = k1, v1, dk1, dv1
    if D2 > 0:
        k2 = rows_of(k_base, keys, k_s, kv_len, D1, D2, DIM, True)
        v2 = rows_of(v_base, keys, v_s, kv_len, D1, D2, DIM, True)
        dk2, dv2 = tl.zeros([BN, D2], tl.float32), tl.zeros([BN, D2], tl.float32)
    exists = keys < kv_len
    if KEY_MASK:
        exists = exists & (tl.load(key_mask + b64 * km_b + keys, mask=keys < kv_len, other=0) != 0)
    c = scale * LOG2E

    for member in range(0, ratio):
        h64 = hk64 * ratio + member
        q_base, g_base = q + (b64 * q_b + h64 * q_h) * UNIT, grad + (b64 * g_b + h64 * g_h) * UNIT
        list_base = q_indices + b64 * i_b + h64 * i_h + column.to(tl.int64) * qcap
        state = b64 * c_b + h64 * c_h + column
        count = tl.load(q_num_blocks + state)
        full = count
        if ELEMENTS > 0:
            full = tl.load(full_q_num_blocks + state)
        bias = tl.zeros([BN], tl.float32)
        if KEY_BIAS:
            bias += tl.load(key_bias + b64 * kb_b + h64 * kb_h + keys, mask=keys < kv_len, other=0.0) * LOG2E
        plain = full
        if RAGGED:
            last = tl.load(list_base + tl.maximum(full - 1, 0), mask=full > 0, other=0)
            plain = full - ((full > 0) & ((last + 1) * (BM * Q_SPLIT) > q_len)).to(tl.int32)
        stats = (b64 * heads + h64) * padded
        gathered = tl.zeros([BN], tl.float32)
        dk1, dk2, dv1, dv2, gathered = dkv_full_blocks(
            k1, k2, v1, v2, dk1, dk2, dv1, dv2, gathered, bias, c, list_base, qcap, plain * Q_SPLIT,
            q_base, q_s, g_base, g_s, logs + stats, delta + stats,
            BM, Q_SPLIT, DIM, D1, D2, KEY_BIAS, BIAS_GRAD, PRECISION, UPCAST, INTERPRET, STAGES,
        )  # fmt: skip
        if RAGGED or ELEMENTS > 0:
            entry_base = list_base
            if ELEMENTS == 4:
                entry_base = entries + b64 * i_b + h64 * i_h + column.to(tl.int64) * qcap
            dk1, dk2, dv1, dv2, gathered = dkv_edge_blocks(
                k1, k2, v1, v2, dk1, dk2, dv1, dv2, gathered, bias, c, list_base, entry_base, plain, full, count,
                keys, exists, b64, h64, q_base, q_s, g_base, g_s, logs + stats, delta + stats,
                ma, mb, ma_b, ma_h, mb_b, n0, n1, n2, n3, q_len, kv_len,
                BM, BN, EM, Q_SPLIT, KV_SPLIT, DIM, D1, D2, ELEMENTS, KEY_BIAS, BIAS_GRAD,
                PRECISION, UPCAST, EDGE_STAGES,
            )  # fmt: skip
        if BIAS_GRAD:
            tl.store(dbias + (b64 * heads + h64) * kv_len + keys, tl.where(exists, gathered, 0.0), mask=keys < kv_len)

    if KEY_MASK:  # what keys got that do not exist
        dk1, dv1 = tl.where(exists[:, None], dk1, 0.0), tl.where(exists[:, None], dv1, 0.0)
        if D2 > 0:
            dk2, dv2 = tl.where(exists[:, None], dk2, 0.0), tl.where(exists[:, None], dv2, 0.0)
    dk_base, dv_base = dk + (b64 * dk_b + hk64 * dk_h) * UNIT, dv + (b64 * dv_b + hk64 * dv_h) * UNIT
    store_rows(dk_base, keys, dk_s, kv_len, dk1 * scale, 0, D1, DIM)
    store_rows(dv_base, keys, dv_s, kv_len, dv1, 0, D1, DIM)
    if D2 > 0:
        store_rows(dk_base, keys, dk_s, kv_len, dk2 * scale, D1, D2, DIM)
        store_rows(dv_base, keys, dv_s, kv_len, dv2, D1, D2, DIM)
