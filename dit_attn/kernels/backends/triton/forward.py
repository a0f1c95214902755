"""Block-sparse attention in Triton, forward: one program per query tile, one loop over the key blocks of its list.

The loop is a dense FlashAttention loop whose next key block comes from a list. What makes it as fast as a dense kernel
per block is in :mod:`~dit_attn.kernels.backends.triton.loops` and :mod:`~dit_attn.kernels.backends.triton.tiles`.

Numbers that depend on the density are not specialized: Triton would recompile where one of them becomes 1 or stops
being a multiple of 16. Every optional term (bias, compensation, epilogue, ...) is a compile-time flag; the plain
variant does not pay for it.

The plain variant rescales lazily (the idea of FlashAttention 4, taken to its end). Any reference ``m`` gives the same
output and log-sum-exp, as long as no sum overflows: the maximum of the first key tile stays the reference of the row,
and the loop has neither a maximum nor a rescaled accumulator, which is a quarter of its instructions. A sum overflows
where a later logit is larger by about 100 in base 2; such a tile is computed again with a running maximum. Only bf16
does so: the largest weight of fp16 is 2^16, and fp32 has no registers left for two loops.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dit_attn.kernels.backends.triton.loops import edge_blocks, full_blocks, pooled_keys
from dit_attn.kernels.backends.triton.tiles import LOG2E, rows_of, store_rows

LN2 = tl.constexpr(0.6931471805599453)
LARGEST_SUM = tl.constexpr(2.0**100)  # of weights relative to a stale maximum; also bounds every weight


@triton.jit
def keys_without_masks(
    q1, q2, extra_q, c, scale, var_cap, list_base, kcap, steps,
    k_base, k_s, k_desc, v_base, v_s, v_desc, mask_base, bias_base, rank_base,
    chosen, words, pooled, nv, ck_base, cv_base, cw_base, cb_base, cr_base,
    BM: tl.constexpr, BN: tl.constexpr, BV: tl.constexpr, KV_SPLIT: tl.constexpr,
    DIM: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    KEY_MASK: tl.constexpr, KEY_BIAS: tl.constexpr, RANK: tl.constexpr,
    COMP: tl.constexpr, COMP_PER_BLOCK: tl.constexpr, COMP_VAR: tl.constexpr, COMP_RANK: tl.constexpr,
    LAZY: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, INTERPRET: tl.constexpr,
    TMA: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Attend to ``steps`` tiles of keys and to the pooled keys of other blocks: (acc1, acc2, m, l)."""
    m = tl.full([BM], float("-inf"), tl.float32)
    l = tl.zeros([BM], tl.float32)
    acc1 = tl.zeros([BM, D1], tl.float32)
    acc2 = acc1
    if D2 > 0:
        acc2 = tl.zeros([BM, D2], tl.float32)
    acc1, acc2, m, l = full_blocks(
        q1, q2, extra_q, acc1, acc2, m, l, c, list_base, kcap, steps,
        k_base, k_s, k_desc, v_base, v_s, v_desc, mask_base, bias_base, rank_base,
        BN, KV_SPLIT, DIM, D1, D2, KEY_MASK, KEY_BIAS, RANK, LAZY, PRECISION, UPCAST, INTERPRET, TMA, STAGES,
    )  # fmt: skip
    if COMP:
        acc1, acc2, m, l = pooled_keys(
            q1, q2, extra_q, acc1, acc2, m, l, c, scale, var_cap, chosen, words, pooled, nv,
            ck_base, cv_base, cw_base, cb_base, cr_base,
            BV, COMP_PER_BLOCK, DIM, D1, D2, COMP_VAR, RANK if COMP_RANK else 0, LAZY, PRECISION, UPCAST,
            1 if COMP_VAR and RANK > 0 else STAGES,  # copies in flight take shared memory
        )  # fmt: skip
    return acc1, acc2, m, l


@triton.jit(
    do_not_specialize=[
        "q_len", "kv_len", "kcap", "nv", "words", "value_shift", "tiles",
        "i_b", "i_h", "c_b", "c_h", "bits_b", "bits_h", "ma_b", "ma_h",
        "n0", "n1", "n2", "n3",
    ]
)  # fmt: skip
def forward_kernel(
    q, k, v, o, lse,
    kv_indices, kv_num_blocks, full_kv_num_blocks,
    key_len, key_mask, key_bias, bias_q, bias_k,
    comp_k, comp_v, comp_bias, comp_var, comp_rank, comp_bits,
    row_scale, row_add, lse_ref, blend,
    ma, mb,
    scale, cap, var_cap,
    q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h, o_b, o_s, o_h,
    i_b, i_h, c_b, c_h,
    km_b, kb_b, kb_h, bq_b, bq_h, bk_b, bk_h,
    cb_b, cb_h, cr_b, cr_h, bits_b, bits_h,
    rs_b, rs_h, ra_b, ra_h, bl_b, ma_b, ma_h, mb_b,
    heads, ratio, tiles, q_len, kv_len, kcap, nv, words, value_shift,
    n0, n1, n2, n3,
    BM: tl.constexpr, BN: tl.constexpr, EN: tl.constexpr, BV: tl.constexpr,
    Q_SPLIT: tl.constexpr, KV_SPLIT: tl.constexpr, UNIT: tl.constexpr,
    DIM: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    RAGGED: tl.constexpr, ELEMENTS: tl.constexpr, KEY_LEN: tl.constexpr, KEY_MASK: tl.constexpr,
    KEY_BIAS: tl.constexpr, RANK: tl.constexpr,
    COMP: tl.constexpr, COMP_PER_BLOCK: tl.constexpr, COMP_VAR: tl.constexpr, COMP_RANK: tl.constexpr,
    ROW_SCALE: tl.constexpr, ROW_ADD: tl.constexpr, LSE_REF: tl.constexpr, BLEND: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, INTERPRET: tl.constexpr,
    LAZY: tl.constexpr, TMA: tl.constexpr, STAGES: tl.constexpr, EDGE_STAGES: tl.constexpr,
):  # fmt: skip
    """Compute o and lse of one query tile. A pointer is not used where its flag is off; strides are in elements."""
    program = tl.program_id(0)
    tile = program % tiles
    h = (program // tiles) % heads
    b = (program // tiles) // heads
    row = tile // Q_SPLIT
    rows = tile * BM + tl.arange(0, BM)
    b64, h64 = b.to(tl.int64), h.to(tl.int64)
    hk64 = (h // ratio).to(tl.int64)
    # Strides come in units of 16 bytes where they are multiples of it, so that copies can be that wide.
    q_base = q + (b64 * q_b + h64 * q_h) * UNIT
    k_base = k + (b64 * k_b + hk64 * k_h) * UNIT
    v_base = v + (b64 * v_b + hk64 * v_h) * UNIT
    q_s, k_s, v_s, o_s = q_s * UNIT, k_s * UNIT, v_s * UNIT, o_s * UNIT
    list_base = kv_indices + b64 * i_b + h64 * i_h + row.to(tl.int64) * kcap
    state = b64 * c_b + h64 * c_h + row

    q1 = rows_of(q_base, rows, q_s, q_len, 0, D1, DIM, True)
    q2 = q1
    if D2 > 0:
        q2 = rows_of(q_base, rows, q_s, q_len, D1, D2, DIM, True)
    extra_q = q1
    ranks = tl.arange(0, 16)
    if RANK > 0:
        extra_q = tl.load(
            bias_q + b64 * bq_b + h64 * bq_h + rows[:, None].to(tl.int64) * RANK + ranks[None, :],
            mask=(rows[:, None] < q_len) & (ranks[None, :] < RANK), other=0.0,
        )  # fmt: skip
    k_desc, v_desc = k_base, v_base
    if TMA:
        k_desc = tl.make_tensor_descriptor(k_base, shape=[kv_len, DIM], strides=[k_s, 1], block_shape=[BN, D1])
        v_desc = tl.make_tensor_descriptor(v_base, shape=[kv_len, DIM], strides=[v_s, 1], block_shape=[BN, D1])

    c = scale * LOG2E

    count = tl.load(kv_num_blocks + state)
    full = count  # entries without an element mask
    if ELEMENTS > 0:
        full = tl.load(full_kv_num_blocks + state)
    limit = kv_len
    if KEY_LEN:
        limit = tl.minimum(tl.load(key_len + b), kv_len)
    if BLEND:
        tau = tl.load(blend + b64 * bl_b + h)
        count = tl.where(tau == 1.0, 0, count)  # such a head returns v itself
        full = tl.minimum(full, count)
    plain = full  # entries without masked keys: lists ascend, so the others come last
    if KEY_LEN:
        plain = 0
        for first in range(0, full, 64):
            places = first + tl.arange(0, 64)
            blocks = tl.load(list_base + places, mask=places < full, other=2147483647 // (BN * KV_SPLIT) - 1)
            plain += tl.sum(((blocks + 1) * (BN * KV_SPLIT) <= limit).to(tl.int32), 0)
    elif RAGGED:
        last = tl.load(list_base + tl.maximum(full - 1, 0), mask=full > 0, other=0)
        plain = full - ((full > 0) & ((last + 1) * (BN * KV_SPLIT) > kv_len)).to(tl.int32)

    # -- keys --
    mask_base, bias_base, rank_base = k_base, k_base, k_base
    if KEY_MASK:
        mask_base = key_mask + b64 * km_b
    if KEY_BIAS:
        bias_base = key_bias + b64 * kb_b + h64 * kb_h
    if RANK > 0:
        rank_base = bias_k + b64 * bk_b + h64 * bk_h
    chosen, pooled = list_base, nv
    ck_base, cv_base, cw_base, cb_base, cr_base = k_base, k_base, k_base, k_base, k_base
    if COMP:  # pooled keys of the skipped blocks, in the same softmax
        pooled_head = (b64 * (heads // ratio) + hk64) * nv * DIM
        ck_base, cv_base, cb_base = comp_k + pooled_head, comp_v + pooled_head, comp_bias + b64 * cb_b + h64 * cb_h
        chosen = comp_bits + b64 * bits_b + h64 * bits_h + row.to(tl.int64) * words
        if BLEND:
            pooled = tl.where(tau == 1.0, 0, nv)
        if COMP_VAR:
            cw_base = comp_var + pooled_head
        if COMP_RANK:
            cr_base = comp_rank + b64 * cr_b + h64 * cr_h
    acc1, acc2, m, l = keys_without_masks(
        q1, q2, extra_q, c, scale, var_cap, list_base, kcap, plain * KV_SPLIT,
        k_base, k_s, k_desc, v_base, v_s, v_desc, mask_base, bias_base, rank_base,
        chosen, words, pooled, nv, ck_base, cv_base, cw_base, cb_base, cr_base,
        BM, BN, BV, KV_SPLIT, DIM, D1, D2, KEY_MASK, KEY_BIAS, RANK,
        COMP, COMP_PER_BLOCK, COMP_VAR, COMP_RANK, LAZY, PRECISION, UPCAST, INTERPRET, TMA, STAGES,
    )  # fmt: skip
    if LAZY:
        exact = tl.sum(l, 0) < LARGEST_SUM
        if not exact:  # a sum overflowed, or something was no number, or pooled keys had no key before them
            acc1, acc2, m, l = keys_without_masks(
                q1, q2, extra_q, c, scale, var_cap, list_base, kcap, plain * KV_SPLIT,
                k_base, k_s, k_desc, v_base, v_s, v_desc, mask_base, bias_base, rank_base,
                chosen, words, pooled, nv, ck_base, cv_base, cw_base, cb_base, cr_base,
                BM, BN, BV, KV_SPLIT, DIM, D1, D2, KEY_MASK, KEY_BIAS, RANK,
                COMP, COMP_PER_BLOCK, COMP_VAR, COMP_RANK, False, PRECISION, UPCAST, INTERPRET, TMA, 1,
            )  # fmt: skip
    if RAGGED or KEY_LEN or ELEMENTS > 0:
        acc1, acc2, m, l = edge_blocks(
            q1, q2, extra_q, acc1, acc2, m, l, c, list_base, plain, full, count, limit, rows, row, b64, h64,
            k_base, k_s, v_base, v_s, mask_base, bias_base, rank_base, ma, mb, ma_b, ma_h, mb_b, n0, n1, n2, n3,
            q_len, kv_len, BM, BN, EN, Q_SPLIT, KV_SPLIT, DIM, D1, D2, ELEMENTS, KEY_MASK, KEY_BIAS, RANK,
            PRECISION, UPCAST, EDGE_STAGES,
        )  # fmt: skip

    # -- epilogue --
    empty = l == 0.0
    row_lse = tl.where(empty, float("-inf"), (m + tl.log2(l)) * LN2)
    stats = (b64 * heads + h64) * q_len + rows
    tl.store(lse + stats, row_lse, mask=rows < q_len)
    factor = tl.where(empty, 0.0, 1.0 / tl.where(empty, 1.0, l))
    if LSE_REF:  # divide by a given denominator instead of the row's own
        given = tl.load(lse_ref + stats, mask=rows < q_len, other=0.0)
        factor *= tl.where(empty, 0.0, tl.exp(tl.minimum(row_lse - given, cap)))
    if ROW_SCALE:
        factor *= tl.load(row_scale + b64 * rs_b + h64 * rs_h + row)
    if BLEND:
        factor *= 1.0 - tau
    out_base = o + (b64 * o_b + h64 * o_h) * UNIT
    acc1 = acc1 * factor[:, None]
    if D2 > 0:
        acc2 = acc2 * factor[:, None]
    if ROW_ADD:
        add_base = row_add + b64 * ra_b + h64 * ra_h + row.to(tl.int64) * DIM
        fraction = 1.0
        if BLEND:
            fraction = 1.0 - tau
        part = tl.arange(0, D1)
        acc1 += tl.load(add_base + part, mask=part < DIM, other=0.0).to(tl.float32)[None, :] * fraction
        if D2 > 0:
            part2 = D1 + tl.arange(0, D2)
            acc2 += tl.load(add_base + part2, mask=part2 < DIM, other=0.0).to(tl.float32)[None, :] * fraction
    if BLEND:
        own = rows + value_shift
        acc1 += tau * rows_of(v_base, own, v_s, kv_len, 0, D1, DIM, True).to(tl.float32)
        if D2 > 0:
            acc2 += tau * rows_of(v_base, own, v_s, kv_len, D1, D2, DIM, True).to(tl.float32)
    store_rows(out_base, rows, o_s, q_len, acc1, 0, D1, DIM)
    if D2 > 0:
        store_rows(out_base, rows, o_s, q_len, acc2, D1, D2, DIM)
