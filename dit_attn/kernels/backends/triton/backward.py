"""Gradients of block-sparse attention in Triton: dq over each query tile's list, dk and dv over the reverse lists.

Every output element is written by exactly one program, so there are no atomics and the result is the same in every run.
With ``p = exp(s - lse)`` and ``delta = rowsum(dO * O) - dlse``: ``ds = p * (dO v^T - delta)``, ``dq = scale * ds k``,
``dk = scale * ds^T q``, ``dv = p^T dO`` and ``dbias = colsum(ds)``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dit_attn.kernels.backends.triton.tiles import (
    LOG2E,
    bit_rows,
    element_allowed,
    list_entry,
    product,
    rows_of,
    store_rows,
)


@triton.jit(do_not_specialize=["q_len"])
def delta_kernel(
    out, grad, grad_lse, delta, o_b, o_s, o_h, g_b, g_s, g_h, l_b, l_h, l_s, heads, q_len, tiles,
    BM: tl.constexpr, DIM: tl.constexpr, D: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Compute delta (B, H, Sq) fp32 = rowsum(grad * out) - grad_lse."""
    program = tl.program_id(0)
    rows = (program % tiles) * BM + tl.arange(0, BM)
    h = ((program // tiles) % heads).to(tl.int64)
    b = ((program // tiles) // heads).to(tl.int64)
    o = rows_of(out + (b * o_b + h * o_h) * UNIT, rows, o_s * UNIT, q_len, 0, D, DIM, True).to(tl.float32)
    g = rows_of(grad + (b * g_b + h * g_h) * UNIT, rows, g_s * UNIT, q_len, 0, D, DIM, True).to(tl.float32)
    inside = rows < q_len
    from_lse = tl.load(grad_lse + b * l_b + h * l_h + rows.to(tl.int64) * l_s, mask=inside, other=0.0)
    tl.store(delta + (b * heads + h) * q_len + rows, tl.sum(o * g, 1) - from_lse, mask=inside)


@triton.jit
def row_stats(lse, delta, base, rows, q_len):
    """Load base-2 LSE (+inf where a row has no key or does not exist, so that p is 0) and delta of some rows."""
    inside = rows < q_len
    logs = tl.load(lse + base + rows, mask=inside, other=float("inf"))
    logs = tl.where(logs == float("-inf"), float("inf"), logs)
    return logs * LOG2E, tl.load(delta + base + rows, mask=inside, other=0.0)


@triton.jit(
    do_not_specialize=[
        "q_len", "kv_len", "kcap", "tiles", "i_b", "i_h", "c_b", "c_h", "ma_b", "ma_h",
        "n0", "n1", "n2", "n3",
    ]
)  # fmt: skip
def dq_kernel(
    q, k, v, grad, dq, lse, delta, kv_indices, kv_num_blocks, full_kv_num_blocks, key_mask, key_bias, ma, mb, scale,
    q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h, g_b, g_s, g_h, dq_b, dq_s, dq_h,
    i_b, i_h, c_b, c_h, km_b, kb_b, kb_h, ma_b, ma_h, mb_b,
    heads, ratio, tiles, q_len, kv_len, kcap,
    n0, n1, n2, n3,
    BM: tl.constexpr, BN: tl.constexpr, Q_SPLIT: tl.constexpr, KV_SPLIT: tl.constexpr, UNIT: tl.constexpr,
    DIM: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    RAGGED: tl.constexpr, ELEMENTS: tl.constexpr, KEY_MASK: tl.constexpr, KEY_BIAS: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, INTERPRET: tl.constexpr,
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
    if D2 > 0:
        q2 = rows_of(q_base, rows, q_s, q_len, D1, D2, DIM, True)
        g2 = rows_of(g_base, rows, g_s, q_len, D1, D2, DIM, True)
        acc2 = tl.zeros([BM, D2], tl.float32)
    logs, spent = row_stats(lse, delta, (b64 * heads + h64) * q_len, rows, q_len)
    c = scale * LOG2E

    count = tl.load(kv_num_blocks + state)
    full = count
    if ELEMENTS > 0:
        full = tl.load(full_kv_num_blocks + state)
    plain = full
    if RAGGED:
        last = tl.load(list_base + tl.maximum(full - 1, 0), mask=full > 0, other=0)
        plain = full - ((full > 0) & ((last + 1) * (BN * KV_SPLIT) > kv_len)).to(tl.int32)

    columns = tl.arange(0, BN)
    for step in tl.range(0, plain * KV_SPLIT, num_stages=STAGES):
        block = list_entry(list_base + tl.minimum(step // KV_SPLIT, kcap - 1), INTERPRET)
        keys = block * (BN * KV_SPLIT) + (step % KV_SPLIT) * BN + columns
        k1 = rows_of(k_base, keys, k_s, kv_len, 0, D1, DIM, False)
        v1 = rows_of(v_base, keys, v_s, kv_len, 0, D1, DIM, False)
        if KEY_MASK:
            exists = tl.load(key_mask + b64 * km_b + keys) != 0
            k1, v1 = tl.where(exists[:, None], k1, 0.0), tl.where(exists[:, None], v1, 0.0)
        s = product(q1, tl.trans(k1), PRECISION, UPCAST)
        dp = product(g1, tl.trans(v1), PRECISION, UPCAST)
        if D2 > 0:
            k2 = rows_of(k_base, keys, k_s, kv_len, D1, D2, DIM, False)
            v2 = rows_of(v_base, keys, v_s, kv_len, D1, D2, DIM, False)
            if KEY_MASK:
                k2, v2 = tl.where(exists[:, None], k2, 0.0), tl.where(exists[:, None], v2, 0.0)
            s += product(q2, tl.trans(k2), PRECISION, UPCAST)
            dp += product(g2, tl.trans(v2), PRECISION, UPCAST)
        s = s * c
        if KEY_BIAS:
            s += tl.load(key_bias + b64 * kb_b + h64 * kb_h + keys)[None, :] * LOG2E
        if KEY_MASK:
            s = tl.where(exists[None, :], s, float("-inf"))
        ds = tl.exp2(s - logs[:, None]) * (dp - spent[:, None])
        acc1 += product(ds.to(k1.dtype), k1, PRECISION, UPCAST)
        if D2 > 0:
            acc2 += product(ds.to(k2.dtype), k2, PRECISION, UPCAST)

    if RAGGED or ELEMENTS > 0:
        for step in tl.range(plain * KV_SPLIT, count * KV_SPLIT, num_stages=EDGE_STAGES):
            entry = step // KV_SPLIT
            keys = tl.load(list_base + entry) * (BN * KV_SPLIT) + (step % KV_SPLIT) * BN + columns
            attended = (keys < kv_len)[None, :] & (rows < q_len)[:, None]
            if KEY_MASK:
                attended = attended & (tl.load(key_mask + b64 * km_b + keys, mask=keys < kv_len, other=0) != 0)[None, :]
            if ELEMENTS > 0:
                q_tokens = tl.minimum(rows, q_len - 1)[:, None]
                k_tokens = tl.minimum(keys, kv_len - 1)[None, :]
                mask_row = ma + b64 * ma_b
                if ELEMENTS == 4:
                    mask_row = bit_rows(
                        ma, b64, h64, ma_b, ma_h, row, tl.maximum(entry - full, 0), rows % (BM * Q_SPLIT), n0,
                        BM * Q_SPLIT, BN * KV_SPLIT,
                    )  # fmt: skip
                allowed = element_allowed(
                    q_tokens, k_tokens, mask_row, mb + b64 * mb_b, mask_row,
                    ((step % KV_SPLIT) * BN + columns)[None, :],
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
                s += tl.load(key_bias + b64 * kb_b + h64 * kb_h + keys, mask=keys < kv_len, other=0.0)[None, :] * LOG2E
            p = tl.where(attended, tl.exp2(s - logs[:, None]), 0.0)
            ds = p * (dp - spent[:, None])
            acc1 += product(ds.to(k1.dtype), k1, PRECISION, UPCAST)
            if D2 > 0:
                acc2 += product(ds.to(k2.dtype), k2, PRECISION, UPCAST)

    base = dq + (b64 * dq_b + h64 * dq_h) * UNIT
    store_rows(base, rows, dq_s, q_len, acc1 * scale, 0, D1, DIM)
    if D2 > 0:
        store_rows(base, rows, dq_s, q_len, acc2 * scale, D1, D2, DIM)


@triton.jit(
    do_not_specialize=[
        "q_len", "kv_len", "qcap", "tiles", "i_b", "i_h", "c_b", "c_h", "ma_b", "ma_h",
        "n0", "n1", "n2", "n3",
    ]
)  # fmt: skip
def dkv_kernel(
    q, k, v, grad, dk, dv, dbias, lse, delta, q_indices, q_num_blocks, full_q_num_blocks, entries,
    key_mask, key_bias, ma, mb, scale,
    q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h, g_b, g_s, g_h, dk_b, dk_s, dk_h, dv_b, dv_s, dv_h,
    i_b, i_h, c_b, c_h, km_b, kb_b, kb_h, ma_b, ma_h, mb_b,
    heads, ratio, tiles, q_len, kv_len, qcap,
    n0, n1, n2, n3,
    BM: tl.constexpr, BN: tl.constexpr, Q_SPLIT: tl.constexpr, KV_SPLIT: tl.constexpr, UNIT: tl.constexpr,
    DIM: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    ELEMENTS: tl.constexpr, KEY_MASK: tl.constexpr, KEY_BIAS: tl.constexpr, BIAS_GRAD: tl.constexpr,
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
    if D2 > 0:
        k2 = rows_of(k_base, keys, k_s, kv_len, D1, D2, DIM, True)
        v2 = rows_of(v_base, keys, v_s, kv_len, D1, D2, DIM, True)
        dk2, dv2 = tl.zeros([BN, D2], tl.float32), tl.zeros([BN, D2], tl.float32)
    exists = keys < kv_len
    if KEY_MASK:
        exists = exists & (tl.load(key_mask + b64 * km_b + keys, mask=keys < kv_len, other=0) != 0)
    c = scale * LOG2E
    places = tl.arange(0, BM)

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
        gathered = tl.zeros([BN], tl.float32)
        for step in tl.range(0, count * Q_SPLIT, num_stages=STAGES):
            block = list_entry(list_base + tl.minimum(step // Q_SPLIT, qcap - 1), INTERPRET)
            rows = block * (BM * Q_SPLIT) + (step % Q_SPLIT) * BM + places
            q1 = rows_of(q_base, rows, q_s, q_len, 0, D1, DIM, True)
            g1 = rows_of(g_base, rows, g_s, q_len, 0, D1, DIM, True)
            logs, spent = row_stats(lse, delta, (b64 * heads + h64) * q_len, rows, q_len)
            s = product(q1, tl.trans(k1), PRECISION, UPCAST)
            dp = product(g1, tl.trans(v1), PRECISION, UPCAST)
            if D2 > 0:
                q2 = rows_of(q_base, rows, q_s, q_len, D1, D2, DIM, True)
                g2 = rows_of(g_base, rows, g_s, q_len, D1, D2, DIM, True)
                s += product(q2, tl.trans(k2), PRECISION, UPCAST)
                dp += product(g2, tl.trans(v2), PRECISION, UPCAST)
            attended = exists[None, :] & (rows < q_len)[:, None]
            if ELEMENTS > 0:
                mask_row = ma + b64 * ma_b
                if ELEMENTS == 4:
                    place = (b64 * i_b + h64 * i_h + column.to(tl.int64) * qcap) + step // Q_SPLIT
                    mask_row = bit_rows(
                        ma, b64, h64, ma_b, ma_h, block, tl.load(entries + place), rows % (BM * Q_SPLIT), n0,
                        BM * Q_SPLIT, BN * KV_SPLIT,
                    )  # fmt: skip
                allowed = element_allowed(
                    tl.minimum(rows, q_len - 1)[:, None], tl.minimum(keys, kv_len - 1)[None, :],
                    mask_row, mb + b64 * mb_b, mask_row, (keys % (BN * KV_SPLIT))[None, :],
                    ELEMENTS, n0, n1, n2, n3,
                )  # fmt: skip
                attended = attended & (allowed | (step // Q_SPLIT < full))
            p = tl.where(attended, tl.exp2(s * c + bias[None, :] - logs[:, None]), 0.0)
            ds = tl.where(attended, p * (dp - spent[:, None]), 0.0)
            p_t, ds_t = tl.trans(p.to(g1.dtype)), tl.trans(ds.to(q1.dtype))
            dv1 += product(p_t, g1, PRECISION, UPCAST)
            dk1 += product(ds_t, q1, PRECISION, UPCAST)
            if D2 > 0:
                dv2 += product(p_t, g2, PRECISION, UPCAST)
                dk2 += product(ds_t, q2, PRECISION, UPCAST)
            if BIAS_GRAD:
                gathered += tl.sum(ds, 0)
        if BIAS_GRAD:
            tl.store(dbias + (b64 * heads + h64) * kv_len + keys, gathered, mask=keys < kv_len)

    dk_base, dv_base = dk + (b64 * dk_b + hk64 * dk_h) * UNIT, dv + (b64 * dv_b + hk64 * dv_h) * UNIT
    store_rows(dk_base, keys, dk_s, kv_len, dk1 * scale, 0, D1, DIM)
    store_rows(dv_base, keys, dv_s, kv_len, dv1, 0, D1, DIM)
    if D2 > 0:
        store_rows(dk_base, keys, dk_s, kv_len, dk2 * scale, D1, D2, DIM)
        store_rows(dv_base, keys, dv_s, kv_len, dv2, D1, D2, DIM)
