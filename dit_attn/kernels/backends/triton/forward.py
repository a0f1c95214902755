"""Block-sparse attention in Triton, forward: one program per query tile, one loop over the key blocks of its list.

The loop is a dense FlashAttention loop whose next key block comes from a list. Two things make it as fast as a dense
kernel per block. The list is loaded by inline PTX: an ordinary load inside the loop becomes a stage of its own in the
compiler's software pipeline, which then drains the prefetch of keys and values at every step. And blocks that need no
mask run in a loop without masks: ragged tails and element masks are left to a second, short loop.

Numbers that depend on the density are not specialized: Triton would recompile where one of them becomes 1 or stops
being a multiple of 16. Every optional term (bias, compensation, epilogue, ...) is a compile-time flag; the plain
variant does not pay for it. Logits are in base 2: ``p = exp2(s * scale * log2(e) - m)``.

The plain variant rescales lazily (the idea of FlashAttention 4, taken to its end). Any reference ``m`` gives the same
output and log-sum-exp, as long as no sum overflows: the maximum of the first key tile stays the reference of the row,
and the loop has neither a maximum nor a rescaled accumulator, which is a quarter of its instructions. A sum overflows
where a later logit is larger by about 100 in base 2; such a tile is computed again with a running maximum. Only bf16
does so: the largest weight of fp16 is 2^16, and fp32 has no registers left for two loops.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LARGEST_SUM = tl.constexpr(2.0**100)  # of weights relative to a stale maximum; also bounds every weight


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
    """Evaluate the window rule along one axis; pointers (M, 1) to first positions and (1, N) to positions of keys."""
    # Volatile: kept out of the loops they do not change in, where three tables of a tile would cost too many registers.
    distance = tl.load(places, volatile=True) - tl.load(starts, volatile=True)
    inside = distance.to(tl.uint32) < size.to(tl.uint32)
    return inside | ((distance + (1 << 29)).to(tl.uint32) >= (1 << 30))  # far: one of them is FREE, which is text


@triton.jit
def element_allowed(
    q, k, ma, mb, bits_row, key_in_block, KIND: tl.constexpr,
    n0, n1, n2, n3,
):  # fmt: skip
    """Evaluate an element mask for q (M, 1) and k (1, N) token numbers; (M, N) bool. Kinds: ``element_masks.py``."""
    if KIND == 1:  # a window of n0 x n1 x n2 positions; tables (Sq, 3) of queries, (Sk, 3) of keys
        allowed = axis_allowed(ma + 3 * q, mb + 3 * k, n0)
        allowed = allowed & axis_allowed(ma + 3 * q + 1, mb + 3 * k + 1, n1)
        allowed = allowed & axis_allowed(ma + 3 * q + 2, mb + 3 * k + 2, n2)
    elif KIND == 2:  # band of n0 keys before and n1 after, n2 sink keys, queries shifted by n3
        distance = k - (q + n3)
        allowed = ((distance >= -n0) & (distance <= n1)) | (k < n2)
    elif KIND == 3:  # equal segment numbers
        allowed = tl.load(ma + q) == tl.load(mb + k)
    else:  # one bit per pair of this entry; bits_row (M, 1) points at the words of each query
        words = tl.load(bits_row + key_in_block // 32)
        allowed = ((words >> (key_in_block % 32)) & 1) != 0
    return allowed


@triton.jit
def bit_rows(ma, b, h, ma_b, ma_h, row, entry, in_block, entries, Q_BLOCK: tl.constexpr, KV_BLOCK: tl.constexpr):
    """Return (M, 1) pointers to the words of queries ``in_block`` of query block ``row`` for a partial entry."""
    words = (KV_BLOCK + 31) // 32
    base = b * ma_b + h * ma_h + (row.to(tl.int64) * entries + entry) * (Q_BLOCK * words)
    return ma + base + in_block[:, None] * words


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

    m = tl.full([BM], float("-inf"), tl.float32)
    l = tl.zeros([BM], tl.float32)
    acc1 = tl.zeros([BM, D1], tl.float32)
    acc2 = acc1
    if D2 > 0:
        acc2 = tl.zeros([BM, D2], tl.float32)
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

    # -- full blocks --
    mask_base, bias_base, rank_base = k_base, k_base, k_base
    if KEY_MASK:
        mask_base = key_mask + b64 * km_b
    if KEY_BIAS:
        bias_base = key_bias + b64 * kb_b + h64 * kb_h
    if RANK > 0:
        rank_base = bias_k + b64 * bk_b + h64 * bk_h
    acc1, acc2, m, l = full_blocks(
        q1, q2, extra_q, acc1, acc2, m, l, c, list_base, kcap, plain * KV_SPLIT,
        k_base, k_s, k_desc, v_base, v_s, v_desc, mask_base, bias_base, rank_base,
        BN, KV_SPLIT, DIM, D1, D2, KEY_MASK, KEY_BIAS, RANK, LAZY, PRECISION, UPCAST, INTERPRET, TMA, STAGES,
    )  # fmt: skip
    if LAZY:
        exact = tl.sum(l, 0) < LARGEST_SUM
        if not exact:  # a sum overflowed, or something was no number
            m = tl.full([BM], float("-inf"), tl.float32)
            l = tl.zeros([BM], tl.float32)
            acc1 = tl.zeros([BM, D1], tl.float32)
            if D2 > 0:
                acc2 = tl.zeros([BM, D2], tl.float32)
            acc1, acc2, m, l = full_blocks(
                q1, q2, extra_q, acc1, acc2, m, l, c, list_base, kcap, plain * KV_SPLIT,
                k_base, k_s, k_desc, v_base, v_s, v_desc, mask_base, bias_base, rank_base,
                BN, KV_SPLIT, DIM, D1, D2, KEY_MASK, KEY_BIAS, RANK, False, PRECISION, UPCAST, INTERPRET, TMA, 1,
            )  # fmt: skip

    # -- ragged blocks and blocks with an element mask --
    if RAGGED or KEY_LEN or ELEMENTS > 0:
        parts = BN * KV_SPLIT // EN
        narrow = tl.arange(0, EN)
        for step in tl.range(plain * parts, count * parts, num_stages=EDGE_STAGES):
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
                exists = exists & (tl.load(key_mask + b64 * km_b + keys, mask=keys < kv_len, other=0) != 0)
            attended = exists[None, :]
            if ELEMENTS > 0:
                bits_row = ma
                if ELEMENTS == 4:
                    bits_row = bit_rows(
                        ma, b64, h64, ma_b, ma_h, row, tl.maximum(entry - full, 0), rows % (BM * Q_SPLIT), n0,
                        BM * Q_SPLIT, BN * KV_SPLIT,
                    )  # fmt: skip
                elif ELEMENTS == 3:
                    bits_row = ma + b64 * ma_b
                q_tokens = tl.minimum(rows, q_len - 1)[:, None]
                k_tokens = tl.minimum(keys, kv_len - 1)[None, :]
                allowed = element_allowed(
                    q_tokens, k_tokens, bits_row, mb + b64 * mb_b, bits_row,
                    ((step % parts) * EN + narrow)[None, :], ELEMENTS, n0, n1, n2, n3,
                )  # fmt: skip
                attended = attended & (allowed | (entry < full))
            if RANK > 0:
                extra_k = tl.load(
                    bias_k + b64 * bk_b + h64 * bk_h + keys[:, None].to(tl.int64) * RANK + ranks[None, :],
                    mask=(keys[:, None] < kv_len) & (ranks[None, :] < RANK), other=0.0,
                )  # fmt: skip
                s += low_rank(extra_q, extra_k)
            if KEY_BIAS:
                s += tl.load(key_bias + b64 * kb_b + h64 * kb_h + keys, mask=keys < kv_len, other=0.0)[None, :] * LOG2E
            s = tl.where(attended, s, float("-inf"))
            p, shrink, m, l = softmax_step(s, m, l, True)
            v1 = tl.where(exists[:, None], rows_of(v_base, keys, v_s, kv_len, 0, D1, DIM, True), 0.0)
            acc1 = acc1 * shrink[:, None] + product(p.to(v1.dtype), v1, PRECISION, UPCAST)
            if D2 > 0:
                v2 = tl.where(exists[:, None], rows_of(v_base, keys, v_s, kv_len, D1, D2, DIM, True), 0.0)
                acc2 = acc2 * shrink[:, None] + product(p.to(v2.dtype), v2, PRECISION, UPCAST)

    # -- pooled keys of the skipped blocks, in the same softmax --
    if COMP:
        ck_base = comp_k + (b64 * (heads // ratio) + hk64) * nv * DIM
        cv_base = comp_v + (b64 * (heads // ratio) + hk64) * nv * DIM
        pooled = nv
        if BLEND:
            pooled = tl.where(tau == 1.0, 0, nv)
        if COMP_VAR:
            cw_base = comp_var + (b64 * (heads // ratio) + hk64) * nv * DIM
            before, after = 1.0, 0.5 * scale * scale
            if q1.dtype == tl.float16:  # its maximum is 65504: squares of queries above 255 are scaled first
                before, after = after, before
            qq1 = (q1.to(tl.float32) * q1.to(tl.float32) * before).to(q1.dtype)
            if D2 > 0:
                qq2 = (q2.to(tl.float32) * q2.to(tl.float32) * before).to(q2.dtype)
        chosen = comp_bits + b64 * bits_b + h64 * bits_h + row.to(tl.int64) * words
        for first in tl.range(0, pooled, BV):
            places = first + tl.arange(0, BV)
            known = places < nv
            k1 = rows_of(ck_base, places, DIM, nv, 0, D1, DIM, True)
            s = product(q1, tl.trans(k1), PRECISION, UPCAST)
            if D2 > 0:
                k2 = rows_of(ck_base, places, DIM, nv, D1, D2, DIM, True)
                s += product(q2, tl.trans(k2), PRECISION, UPCAST)
            s = s * c
            if COMP_VAR:
                w1 = rows_of(cw_base, places, DIM, nv, 0, D1, DIM, True)
                variance = product(qq1, tl.trans(w1), PRECISION, UPCAST)
                if D2 > 0:
                    w2 = rows_of(cw_base, places, DIM, nv, D1, D2, DIM, True)
                    variance += product(qq2, tl.trans(w2), PRECISION, UPCAST)
                s += tl.minimum(variance * after, var_cap) * LOG2E
            if COMP_RANK:
                extra_k = tl.load(
                    comp_rank + b64 * cr_b + h64 * cr_h + places[:, None].to(tl.int64) * RANK + ranks[None, :],
                    mask=known[:, None] & (ranks[None, :] < RANK), other=0.0,
                )  # fmt: skip
                s += low_rank(extra_q, extra_k)
            s += tl.load(comp_bias + b64 * cb_b + h64 * cb_h + places, mask=known, other=0.0)[None, :] * LOG2E
            home = places // COMP_PER_BLOCK
            word = tl.load(chosen + home // 32, mask=known, other=-1)
            skipped = known & (((word >> (home % 32)) & 1) == 0)
            s = tl.where(skipped[None, :], s, float("-inf"))
            p, shrink, m, l = softmax_step(s, m, l, True)
            v1 = rows_of(cv_base, places, DIM, nv, 0, D1, DIM, True)
            acc1 = acc1 * shrink[:, None] + product(p.to(v1.dtype), v1, PRECISION, UPCAST)
            if D2 > 0:
                v2 = rows_of(cv_base, places, DIM, nv, D1, D2, DIM, True)
                acc2 = acc2 * shrink[:, None] + product(p.to(v2.dtype), v2, PRECISION, UPCAST)

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
