"""Choosing key blocks in a Triton kernel that scores pooled blocks, chooses and writes the lists.

``select_kernel`` holds the scores of a few query blocks against every key block in registers. The k-th best score is
found bit by bit: an fp32 number maps to an integer of the same order, and 32 counts fix its 32 bits, exactly and
without a sort. ``top_p`` first fixes the bits of the largest threshold whose blocks reach the mass. The host reads
nothing back, and equal scores go to the lower index, so the choice is the same in every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dit_attn.kernels.device import full_precision
from dit_attn.kernels.launch import Launch
from dit_attn.kernels.layout import BlockLayout, ceil_div
from dit_attn.kernels.selection import Budget, blocks_of_density, check_budget
from dit_attn.kernels.triton_pooling import fused_pool

LOWEST = tl.constexpr(-2147483648)  # the integer below every score: a block that cannot be chosen
SCRATCH = 1 << 26
"""Bytes of block scores that are written at a time when a row is too long to be scored in registers."""


@triton.jit
def ordered(s):
    """int32 of the same order as the fp32 ``s``; -0 equals 0 and NaN comes first, as in a descending sort."""
    bits = tl.where(s == 0.0, 0.0, s).to(tl.int32, bitcast=True)
    return tl.where(s != s, 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit
def pooled_scores(
    q_mean, k_mean, counts, rows, columns, nq, nk, scale,
    DIM: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, NK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(ROWS, NK) logits of pooled queries and keys, plus the logarithm of the tokens in the key block."""
    s = tl.zeros((ROWS, NK), tl.float32)
    for start in tl.range(0, DIM, CHUNK):
        channels = start + tl.arange(0, CHUNK)
        q = tl.load(
            q_mean + rows[:, None] * DIM + channels[None, :],
            mask=(rows[:, None] < nq) & (channels[None, :] < DIM), other=0.0,
        )  # fmt: skip
        k = tl.load(
            k_mean + columns[None, :] * DIM + channels[:, None],
            mask=(columns[None, :] < nk) & (channels[:, None] < DIM), other=0.0,
        )  # fmt: skip
        s = tl.dot(q, k, s, input_precision=PRECISION)
    present = tl.load(counts + columns, mask=columns < nk, other=0.0)
    return s * scale + tl.log(present)[None, :]


@triton.jit
def blocks_of_mass(image, mass, missing, ROWS: tl.constexpr, NK: tl.constexpr):
    """(ROWS,) the fewest of the best blocks whose mass reaches ``missing``; NK if all of them fall short."""
    found, one = tl.zeros((ROWS,), tl.int32), tl.full((ROWS,), 1, tl.int32)
    for place in tl.range(0, 32):
        trial = found | (one << (31 - place))
        reached = tl.sum(tl.where(image >= (trial ^ LOWEST)[:, None], mass, 0.0), 1)
        found = tl.where(reached >= missing, trial, found)
    threshold = (found ^ LOWEST)[:, None]
    above = image > threshold
    level = image == threshold
    each = tl.max(tl.where(level, mass, 0.0), 1)
    still = missing - tl.sum(tl.where(above, mass, 0.0), 1)
    tied = tl.sum(level.to(tl.int32), 1)
    share = tl.where(each > 0.0, still / tl.where(each > 0.0, each, 1.0), 1.0)
    some = tl.minimum(tl.maximum(tl.ceil(share).to(tl.int32), 1), tied)
    needed = tl.sum(above.to(tl.int32), 1) + some
    needed = tl.where(found == 0, NK, needed)
    return tl.where(missing <= 0.0, 0, needed)


@triton.jit
def best(image, wanted, ROWS: tl.constexpr):
    """(ROWS, NK) bool, the ``wanted`` (ROWS,) largest of each row, or all there are; of equal ones the first."""
    found, one = tl.zeros((ROWS,), tl.int32), tl.full((ROWS,), 1, tl.int32)
    for place in tl.range(0, 32):
        trial = found | (one << (31 - place))
        enough = tl.sum((image >= (trial ^ LOWEST)[:, None]).to(tl.int32), 1) >= wanted
        found = tl.where(enough, trial, found)
    threshold = (found ^ LOWEST)[:, None]
    above = image > threshold
    level = image == threshold
    left = wanted - tl.sum(above.to(tl.int32), 1)
    chosen = above | (level & (tl.cumsum(level.to(tl.int32), 1) <= left[:, None]))
    return chosen & (image > LOWEST)


@triton.jit(do_not_specialize=["kcap", "budget", "words", "tiles"])
def select_kernel(
    q_mean, k_mean, counts, scores, forced, kv_idx, kv_cnt, kept, bits,
    nq, nk, heads, ratio, kcap, words, tiles, scale, budget, top_p, held,
    counts_b, s_b, s_h, s_q, s_k, f_b, f_h, f_q, f_k,
    DIM: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, NK: tl.constexpr, PRECISION: tl.constexpr,
    GIVEN: tl.constexpr, TOP_P: tl.constexpr, FORCED: tl.constexpr, STATS: tl.constexpr,
    HELD: tl.constexpr,
):  # fmt: skip
    """Lists of the chosen key blocks of ROWS query blocks. ``budget``: blocks, or with TOP_P the smallest number.

    With HELD, the budget (or with TOP_P the mass) is where ``held`` points.
    """
    program = tl.program_id(0).to(tl.int64)
    tile = (program % tiles).to(tl.int32)
    h = (program // tiles) % heads
    b = program // tiles // heads
    rows = tile * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, NK)
    inside = (rows[:, None] < nq) & (columns[None, :] < nk)
    rows64 = rows.to(tl.int64)

    if GIVEN:
        places = scores + b * s_b + h * s_h + rows64[:, None] * s_q + columns[None, :].to(tl.int64) * s_k
        s = tl.load(places, mask=inside, other=float("-inf")).to(tl.float32)
    else:
        key_head = h // ratio
        s = pooled_scores(
            q_mean + (b * heads + h) * nq * DIM, k_mean + (b * (heads // ratio) + key_head) * nk * DIM,
            counts + b * counts_b, rows, columns, nq, nk, scale, DIM, CHUNK, ROWS, NK, PRECISION,
        )  # fmt: skip
        s = tl.where(inside, s, float("-inf"))

    candidate = inside & (s != float("-inf"))
    if FORCED:
        places = forced + b * f_b + h * f_h + rows64[:, None] * f_q + columns[None, :].to(tl.int64) * f_k
        fixed = inside & (tl.load(places, mask=inside, other=0) != 0)
        candidate = candidate & (fixed == 0)
        n_fixed = tl.sum(fixed.to(tl.int32), 1)
    else:
        n_fixed = tl.zeros((ROWS,), tl.int32)
    image = tl.where(candidate, ordered(s), LOWEST)
    if TOP_P or STATS:
        peak = tl.max(s, 1)
        mass = tl.exp(s - tl.where(peak == float("-inf"), 0.0, peak)[:, None])
        whole = tl.sum(mass, 1)
        mass = mass / tl.where(whole > 0.0, whole, 1.0)[:, None]

    if HELD:
        if TOP_P:
            top_p = tl.load(held)
        else:
            budget = tl.load(held)
    wanted = budget - n_fixed
    if TOP_P:
        missing = tl.full((ROWS,), top_p, tl.float32)
        if FORCED:
            missing -= tl.sum(tl.where(fixed, mass, 0.0), 1)
        needed = blocks_of_mass(image, tl.where(candidate, mass, 0.0), missing, ROWS, NK)
        needed = tl.where(top_p >= 1.0, NK, needed)
        wanted = tl.maximum(wanted, needed)
    chosen = best(image, tl.maximum(wanted, 0), ROWS)
    if FORCED:
        chosen = chosen | fixed

    at = (b * heads + h) * nq + rows64
    place = tl.cumsum(chosen.to(tl.int32), 1) - 1
    count = tl.max(place, 1) + 1
    row = kv_idx + at[:, None] * kcap
    tl.store(row + place, tl.broadcast_to(columns[None, :], (ROWS, NK)), mask=chosen)
    blank = (rows[:, None] < nq) & (columns[None, :] >= count[:, None]) & (columns[None, :] < kcap)
    tl.store(row + columns[None, :], tl.zeros((ROWS, NK), tl.int32), mask=blank)
    tl.store(kv_cnt + at, count, mask=rows < nq)
    if STATS:
        tl.store(kept + at, tl.sum(tl.where(chosen, mass, 0.0), 1), mask=rows < nq)
        flags = tl.reshape(chosen.to(tl.int32), (ROWS, NK // 32, 32)) << tl.arange(0, 32)[None, None, :]
        word = tl.arange(0, NK // 32)[None, :]
        tl.store(bits + at[:, None] * words + word, tl.sum(flags, 2), mask=(rows[:, None] < nq) & (word < words))


# -- launches ----------------------------------------------------------------------------------------------------------

SCORED = 1024
"""Key blocks up to which a program scores its rows itself; longer rows are scored by a matrix product first."""
IN_REGISTERS = 8192
"""Scores a program holds, and with them the longest row; half of them where it holds forced blocks too."""


def fused_select(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    q_block: int,
    kv_block: int,
    density: Budget | None = None,
    top_p: Budget | None = None,
    k_min: int = 1,
    forced: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    scale: float | None = None,
    stats: bool = False,
) -> tuple[BlockLayout, torch.Tensor | None, torch.Tensor | None]:
    """Layout, kept mass and bits for q (B, S, H, D) and k (B, Sk, Hk, D); see ``selection.plan_blocks``.

    One graph node for the compiler; nothing is read back from the device.
    """
    check_budget(density, top_p)
    nk = ceil_div(k.shape[1], kv_block)
    budget = _budget(density, top_p, k_min, nk, q.device)
    idx, cnt, kept, bits = select_op(
        q, k, forced, key_mask, *budget, float(q.shape[-1] ** -0.5 if scale is None else scale), q_block, kv_block,
        stats,
    )  # fmt: skip
    known = top_p is None and budget[2] is None and forced is None and key_mask is None
    layout = BlockLayout(q_block, kv_block, q.shape[1], k.shape[1], idx, cnt, budget[0] if known else None)
    return (layout, kept, bits) if stats else (layout, None, None)


def fused_select_scores(
    scores: torch.Tensor,
    *,
    density: Budget | None = None,
    top_p: Budget | None = None,
    k_min: int = 1,
    forced: torch.Tensor | None = None,
    q_len: int,
    kv_len: int,
    q_block: int,
    kv_block: int,
    stats: bool = False,
) -> tuple[BlockLayout, torch.Tensor | None, torch.Tensor | None]:
    """The same for given scores (B, H, nq, nk), any strides; see ``selection.plan_scores``."""
    check_budget(density, top_p)
    budget = _budget(density, top_p, k_min, ceil_div(kv_len, kv_block), scores.device)
    idx, cnt, kept, bits = select_scores_op(scores, forced, *budget, stats)
    layout = BlockLayout(q_block, kv_block, q_len, kv_len, idx, cnt)  # a score may be -inf
    return (layout, kept, bits) if stats else (layout, None, None)


def _budget(
    density: Budget | None, top_p: Budget | None, k_min: int, nk: int, device: torch.device
) -> tuple[int, float | None, torch.Tensor | None]:
    """Blocks a row (the fewest, with a mass), mass, and the one of the two that stays on the device, if it is there."""
    if isinstance(top_p, torch.Tensor):
        return k_min, 1.0, top_p.to(device, torch.float32)
    if density is None:
        return k_min, top_p, None
    count = blocks_of_density(density, nk)
    return (nk, None, count.to(device, torch.int32)) if isinstance(count, torch.Tensor) else (count, None, None)


# -- operators: opaque to the compiler, flat arguments -----------------------------------------------------------------

Lists = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
_BUDGET = "SymInt count, float? top_p, Tensor? held"
_RESULT = "(Tensor kv_idx, Tensor kv_cnt, Tensor kept, Tensor bits)"


def _select(
    q: torch.Tensor,
    k: torch.Tensor,
    forced: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    count: int,
    top_p: float | None,
    held: torch.Tensor | None,
    scale: float,
    q_block: int,
    kv_block: int,
    stats: bool,
) -> Lists:
    q_mean, _, _ = fused_pool(q, q_block)
    k_mean, _, counts = fused_pool(k, kv_block, key_mask)
    out = _lists(q_mean, k_mean.shape[2], forced, count, top_p, stats)
    if k_mean.shape[2] <= SCORED:
        plan_select((q_mean, k_mean, counts), None, forced, count, top_p, held, scale, out).run()
    else:
        _select_long_rows(q_mean, k_mean, counts, forced, count, top_p, held, scale, out)
    return out


def _select_long_rows(
    q_mean: torch.Tensor,
    k_mean: torch.Tensor,
    counts: torch.Tensor,
    forced: torch.Tensor | None,
    count: int,
    top_p: float | None,
    held: torch.Tensor | None,
    scale: float,
    out: Lists,
) -> None:
    """Scores by a matrix product, a few heads at a time, then the choice from them."""
    ratio = q_mean.shape[1] // k_mean.shape[1]
    nq, nk = q_mean.shape[2], k_mean.shape[2]
    group = max(1, SCRATCH // (4 * nq * nk * ratio))
    weight = counts.log()[:, None, None, :]
    whole = None if forced is None else _expanded(forced, *q_mean.shape[:2], nq, nk)
    for b in range(q_mean.shape[0]):
        for low in range(0, k_mean.shape[1], group):
            heads = slice(low * ratio, (low + group) * ratio)
            keys = k_mean[b : b + 1, low : low + group].repeat_interleave(ratio, 1)
            with full_precision(keys.device):
                scores = (q_mean[b : b + 1, heads] @ keys.transpose(-1, -2)) * scale + weight[b : b + 1]
            fixed = None if whole is None else whole[b : b + 1, heads]
            idx, cnt, kept, bits = (x[b : b + 1, heads] if x.ndim > 1 else x for x in out)
            plan_select(None, scores, fixed, count, top_p, held, 1.0, (idx, cnt, kept, bits)).run()


def _select_scores(
    scores: torch.Tensor,
    forced: torch.Tensor | None,
    count: int,
    top_p: float | None,
    held: torch.Tensor | None,
    stats: bool,
) -> Lists:
    out = _lists(scores, scores.shape[-1], forced, count, top_p, stats)
    plan_select(None, scores, forced, count, top_p, held, 1.0, out).run()
    return out


def _lists(
    like: torch.Tensor, nk: int, forced: torch.Tensor | None, count: int, top_p: float | None, stats: bool
) -> Lists:
    """Room for the results for ``like`` (B, H, nq, ...), as wide as a row can get; the last two only with ``stats``."""
    rows = tuple(like.shape[:3])
    cap = count if top_p is None and forced is None else nk
    wide = rows if stats else (0,)
    return (
        torch.empty(*rows, cap, dtype=torch.int32, device=like.device),
        torch.empty(*rows, dtype=torch.int32, device=like.device),
        torch.empty(wide, dtype=torch.float32, device=like.device),
        torch.empty((*rows, ceil_div(nk, 32)) if stats else (0,), dtype=torch.int32, device=like.device),
    )


select_op = torch.library.custom_op(
    "dit_attn::select_blocks", _select, mutates_args=(),
    schema=(
        f"(Tensor q, Tensor k, Tensor? forced, Tensor? key_mask, {_BUDGET}, float scale, SymInt q_block, "
        f"SymInt kv_block, bool stats) -> {_RESULT}"
    ),
)  # fmt: skip
select_scores_op = torch.library.custom_op(
    "dit_attn::select_scores", _select_scores, mutates_args=(),
    schema=f"(Tensor scores, Tensor? forced, {_BUDGET}, bool stats) -> {_RESULT}",
)  # fmt: skip


@select_op.register_fake
def _select_fake(
    q: torch.Tensor,
    k: torch.Tensor,
    forced: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    count: int,
    top_p: float | None,
    held: torch.Tensor | None,
    scale: float,
    q_block: int,
    kv_block: int,
    stats: bool,
) -> Lists:
    like = q.new_empty(q.shape[0], q.shape[2], ceil_div(q.shape[1], q_block))
    return _lists(like, ceil_div(k.shape[1], kv_block), forced, count, top_p, stats)


@select_scores_op.register_fake
def _select_scores_fake(
    scores: torch.Tensor,
    forced: torch.Tensor | None,
    count: int,
    top_p: float | None,
    held: torch.Tensor | None,
    stats: bool,
) -> Lists:
    return _lists(scores, scores.shape[-1], forced, count, top_p, stats)


# -- plans -------------------------------------------------------------------------------------------------------------


def plan_select(
    pooled: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None,
    scores: torch.Tensor | None,
    forced: torch.Tensor | None,
    count: int,
    top_p: float | None,
    held: torch.Tensor | None,
    scale: float,
    out: Lists,
) -> Launch:
    """The launch that fills ``out`` from pooled queries, keys and counts, or from scores."""
    kv_idx, kv_cnt, kept, bits = out
    batch, heads, nq = kv_cnt.shape
    q_mean, k_mean, counts = pooled or (None, None, None)
    if k_mean is not None:
        nk, dim, ratio = k_mean.shape[2], k_mean.shape[3], heads // k_mean.shape[1]
    else:
        assert scores is not None
        nk, dim, ratio = scores.shape[-1], 16, 1
    width = max(32, triton.next_power_of_2(nk))
    fixed = None if forced is None else _expanded(forced, batch, heads, nq, nk)
    rows = max(1, min(16, (IN_REGISTERS if fixed is None else IN_REGISTERS // 2) // width))
    tiles = ceil_div(nq, rows)
    s_strides = (0, 0, 0, 0) if scores is None else scores.stride()
    f_strides = (0, 0, 0, 0) if fixed is None else fixed.stride()
    arguments = {
        "q_mean": q_mean, "k_mean": k_mean, "counts": counts, "scores": scores, "forced": fixed,
        "kv_idx": kv_idx, "kv_cnt": kv_cnt, "kept": kept, "bits": bits,
        "nq": nq, "nk": nk, "heads": heads, "ratio": ratio, "kcap": kv_idx.shape[-1], "words": ceil_div(nk, 32),
        "tiles": tiles, "scale": scale, "budget": max(1, count), "top_p": 1.0 if top_p is None else top_p,
        "held": held,
        "counts_b": 0 if counts is None else counts.stride(0),
        **dict(zip(("s_b", "s_h", "s_q", "s_k"), s_strides)), **dict(zip(("f_b", "f_h", "f_q", "f_k"), f_strides)),
        "DIM": dim, "CHUNK": 16, "ROWS": rows, "NK": width, "PRECISION": "ieee",
        "GIVEN": scores is not None, "TOP_P": top_p is not None, "FORCED": fixed is not None,
        "STATS": kept.ndim > 1, "HELD": held is not None,
    }  # fmt: skip
    warps = max(4, min(8, rows * width // 512))
    return Launch(select_kernel, batch * heads * tiles, arguments, warps, 1)


def _expanded(forced: torch.Tensor, *shape: int) -> torch.Tensor:
    """``forced`` as bytes of a full shape, nothing copied."""
    return forced.view(torch.uint8).expand(shape)
