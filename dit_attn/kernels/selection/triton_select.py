"""Selection of key blocks in one Triton kernel, which scores pooled blocks, chooses and writes the lists.

``select_kernel`` keeps the scores of a few query blocks against every key block in registers. The k-th best score is
found bit by bit: an fp32 number maps to an integer of the same order, and 32 counts determine its 32 bits, exactly and
without a sort. ``top_p`` first determines the bits of the largest threshold whose blocks reach the mass. Nothing is
copied to the host, and of equal scores the lower index wins, so the choice is the same in every run.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from dit_attn.kernels.device import full_precision
from dit_attn.kernels.layouts.block_layout import BlockLayout, ceil_div
from dit_attn.kernels.selection.budget import Budget, resolve_budget
from dit_attn.kernels.selection.triton_pool import fused_pool
from dit_attn.kernels.triton_launch import Launch

NEVER = tl.constexpr(-2147483648)  # the integer below every score: a block that cannot be chosen
SCORE_BYTES = 1 << 26
"""Bytes of block scores computed at a time when a row is too long to be scored in registers."""


@triton.jit
def ordered(s):
    """Map fp32 ``s`` to int32 of the same order; -0 equals 0 and NaN is the largest, as in a descending sort."""
    bits = tl.where(s == 0.0, 0.0, s).to(tl.int32, bitcast=True)
    return tl.where(s != s, 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit
def pooled_scores(
    q_mean, k_mean, counts, rows, columns, nq, nk, scale,
    DIM: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, NK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute (ROWS, NK) logits of pooled queries and keys, plus the logarithm of the key block's token count."""
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
    """Count (ROWS,) the fewest best blocks whose mass reaches ``missing``; NK if all of them fall short."""
    found, one = tl.zeros((ROWS,), tl.int32), tl.full((ROWS,), 1, tl.int32)
    for place in tl.range(0, 32):
        trial = found | (one << (31 - place))
        reached = tl.sum(tl.where(image >= (trial ^ NEVER)[:, None], mass, 0.0), 1)
        found = tl.where(reached >= missing, trial, found)
    threshold = (found ^ NEVER)[:, None]
    above = image > threshold
    level = image == threshold
    each = tl.max(tl.where(level, mass, 0.0), 1)
    still = missing - tl.sum(tl.where(above, mass, 0.0), 1)
    tied = tl.sum(level.to(tl.int32), 1)
    quotient = tl.where(each > 0.0, still / tl.where(each > 0.0, each, 1.0), 1.0)
    some = tl.minimum(tl.maximum(tl.ceil(quotient).to(tl.int32), 1), tied)
    needed = tl.sum(above.to(tl.int32), 1) + some
    needed = tl.where(found == 0, NK, needed)
    return tl.where(missing <= 0.0, 0, needed)


@triton.jit
def best(image, wanted, ROWS: tl.constexpr):
    """Mark (ROWS, NK) the ``wanted`` (ROWS,) largest of each row, or all there are; of equal ones the first."""
    found, one = tl.zeros((ROWS,), tl.int32), tl.full((ROWS,), 1, tl.int32)
    for place in tl.range(0, 32):
        trial = found | (one << (31 - place))
        enough = tl.sum((image >= (trial ^ NEVER)[:, None]).to(tl.int32), 1) >= wanted
        found = tl.where(enough, trial, found)
    threshold = (found ^ NEVER)[:, None]
    above = image > threshold
    level = image == threshold
    left = wanted - tl.sum(above.to(tl.int32), 1)
    chosen = above | (level & (tl.cumsum(level.to(tl.int32), 1) <= left[:, None]))
    return chosen & (image > NEVER)


@triton.jit(do_not_specialize=["kcap", "budget", "words", "tiles", "n_b", "n_h", "p_b", "p_h"])
def select_kernel(
    q_mean, k_mean, counts, scores, forced, kv_indices, kv_num_blocks, selected_mass, bits,
    nq, nk, heads, ratio, kcap, words, tiles, scale, budget, top_p, head_count, head_mass,
    counts_b, s_b, s_h, s_q, s_k, f_b, f_h, f_q, f_k, n_b, n_h, p_b, p_h,
    DIM: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, NK: tl.constexpr, PRECISION: tl.constexpr,
    GIVEN: tl.constexpr, TOP_P: tl.constexpr, FORCED: tl.constexpr, STATS: tl.constexpr,
    HEAD_COUNT: tl.constexpr, HEAD_MASS: tl.constexpr,
):  # fmt: skip
    """Write the lists of the chosen key blocks of ROWS query blocks. ``budget``: blocks, or with TOP_P the fewest.

    With HEAD_COUNT the budget, and with HEAD_MASS the mass, is that of the sample and head in a table.
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
    image = tl.where(candidate, ordered(s), NEVER)
    if TOP_P or STATS:
        peak = tl.max(s, 1)
        mass = tl.exp(s - tl.where(peak == float("-inf"), 0.0, peak)[:, None])
        total = tl.sum(mass, 1)
        mass = mass / tl.where(total > 0.0, total, 1.0)[:, None]

    if HEAD_COUNT:
        budget = tl.load(head_count + b * n_b + h * n_h)
    if HEAD_MASS:
        top_p = tl.load(head_mass + b * p_b + h * p_h)
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
    row = kv_indices + at[:, None] * kcap
    tl.store(row + place, tl.broadcast_to(columns[None, :], (ROWS, NK)), mask=chosen)
    blank = (rows[:, None] < nq) & (columns[None, :] >= count[:, None]) & (columns[None, :] < kcap)
    tl.store(row + columns[None, :], tl.zeros((ROWS, NK), tl.int32), mask=blank)
    tl.store(kv_num_blocks + at, count, mask=rows < nq)
    if STATS:
        tl.store(selected_mass + at, tl.sum(tl.where(chosen, mass, 0.0), 1), mask=rows < nq)
        flags = tl.reshape(chosen.to(tl.int32), (ROWS, NK // 32, 32)) << tl.arange(0, 32)[None, None, :]
        word = tl.arange(0, NK // 32)[None, :]
        tl.store(bits + at[:, None] * words + word, tl.sum(flags, 2), mask=(rows[:, None] < nq) & (word < words))


# -- launches ----------------------------------------------------------------------------------------------------------

MAX_SCORED_ROW = 1024
"""Longest row, in key blocks, that the kernel scores itself; longer ones are scored by a matrix product first."""
MAX_REGISTER_SCORES = 8192
"""Scores a program keeps in registers, which limits the row length; half as many with forced blocks."""


def fused_select(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    q_block: int,
    kv_block: int,
    density: Budget | None = None,
    top_p: Budget | None = None,
    k_min: int | Sequence[int] = 1,
    forced: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    scale: float | None = None,
    stats: bool = False,
) -> tuple[BlockLayout, torch.Tensor | None, torch.Tensor | None]:
    """Choose key blocks for q (B, S, H, D) and k (B, Sk, Hk, D), as ``plan_blocks`` does, without its checks.

    One graph node for the compiler; nothing is copied back from the device.

    Returns:
        layout, and with ``stats`` the selected mass and the bits of a ``BlockPlan``.
    """
    budget = _budget(density, top_p, k_min, ceil_div(k.shape[1], kv_block), q.device)
    idx, cnt, selected_mass, bits = select_op(
        q, k, forced, key_mask, *budget, float(q.shape[-1] ** -0.5 if scale is None else scale), q_block, kv_block,
        stats,
    )  # fmt: skip
    known = all(x is None for x in (*budget[1:], forced, key_mask))
    layout = BlockLayout(q_block, kv_block, q.shape[1], k.shape[1], idx, cnt, budget[0] if known else None)
    return (layout, selected_mass, bits) if stats else (layout, None, None)


def fused_select_scores(
    scores: torch.Tensor,
    *,
    density: Budget | None = None,
    top_p: Budget | None = None,
    k_min: int | Sequence[int] = 1,
    forced: torch.Tensor | None = None,
    q_len: int,
    kv_len: int,
    q_block: int,
    kv_block: int,
    stats: bool = False,
) -> tuple[BlockLayout, torch.Tensor | None, torch.Tensor | None]:
    """Choose key blocks by given scores (B, H, nq, nk), any strides, as ``plan_scores`` does, without its checks."""
    budget = _budget(density, top_p, k_min, ceil_div(kv_len, kv_block), scores.device)
    idx, cnt, selected_mass, bits = select_scores_op(scores, forced, *budget, stats)
    layout = BlockLayout(q_block, kv_block, q_len, kv_len, idx, cnt)  # a score may be -inf
    return (layout, selected_mass, bits) if stats else (layout, None, None)


def _budget(
    density: Budget | None, top_p: Budget | None, k_min: int | Sequence[int], nk: int, device: torch.device
) -> BudgetArguments:
    """The flat arguments of a budget: blocks, mass, and tables (B|1, H|1) in place of them where heads differ."""
    count, mass, most = resolve_budget(density, top_p, k_min, nk, device)
    counts = count[..., 0].to(torch.int32) if isinstance(count, torch.Tensor) else None
    if isinstance(mass, torch.Tensor):
        return most, 1.0, counts, mass[..., 0]
    return most, mass, counts, None


# -- operators: opaque to the compiler, flat arguments -----------------------------------------------------------------

Lists = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
BudgetArguments = tuple[int, float | None, torch.Tensor | None, torch.Tensor | None]
_BUDGET = "SymInt count, float? top_p, Tensor? head_count, Tensor? head_mass"
_RESULT = "(Tensor kv_indices, Tensor kv_num_blocks, Tensor selected_mass, Tensor bits)"


def _select(
    q: torch.Tensor,
    k: torch.Tensor,
    forced: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    count: int,
    top_p: float | None,
    head_count: torch.Tensor | None,
    head_mass: torch.Tensor | None,
    scale: float,
    q_block: int,
    kv_block: int,
    stats: bool,
) -> Lists:
    q_mean, _, _ = fused_pool(q, q_block)
    k_mean, _, counts = fused_pool(k, kv_block, key_mask)
    out = _lists(q_mean, k_mean.shape[2], forced, count, top_p, stats)
    if k_mean.shape[2] <= MAX_SCORED_ROW:
        pooled = (q_mean, k_mean, counts)
        plan_select(pooled, None, forced, (count, top_p, head_count, head_mass), scale, out).run()
    else:
        _select_long_rows(q_mean, k_mean, counts, forced, (count, top_p, head_count, head_mass), scale, out)
    return out


def _select_long_rows(
    q_mean: torch.Tensor,
    k_mean: torch.Tensor,
    counts: torch.Tensor,
    forced: torch.Tensor | None,
    budget: BudgetArguments,
    scale: float,
    out: Lists,
) -> None:
    """Score by a matrix product, a few heads at a time, then choose."""
    ratio = q_mean.shape[1] // k_mean.shape[1]
    nq, nk = q_mean.shape[2], k_mean.shape[2]
    group = max(1, SCORE_BYTES // (4 * nq * nk * ratio))
    weight = counts.log()[:, None, None, :]
    expanded = None if forced is None else _expanded(forced, *q_mean.shape[:2], nq, nk)
    tables = [None if x is None else x.expand(q_mean.shape[:2]) for x in budget[2:]]
    for b in range(q_mean.shape[0]):
        for low in range(0, k_mean.shape[1], group):
            heads = slice(low * ratio, (low + group) * ratio)
            keys = k_mean[b : b + 1, low : low + group].repeat_interleave(ratio, 1)
            with full_precision(keys.device):
                scores = (q_mean[b : b + 1, heads] @ keys.transpose(-1, -2)) * scale + weight[b : b + 1]
            fixed = None if expanded is None else expanded[b : b + 1, heads]
            idx, cnt, selected_mass, bits = (x[b : b + 1, heads] if x.ndim > 1 else x for x in out)
            head_count, head_mass = (None if x is None else x[b : b + 1, heads] for x in tables)
            some = (*budget[:2], head_count, head_mass)
            plan_select(None, scores, fixed, some, 1.0, (idx, cnt, selected_mass, bits)).run()


def _select_scores(
    scores: torch.Tensor,
    forced: torch.Tensor | None,
    count: int,
    top_p: float | None,
    head_count: torch.Tensor | None,
    head_mass: torch.Tensor | None,
    stats: bool,
) -> Lists:
    out = _lists(scores, scores.shape[-1], forced, count, top_p, stats)
    plan_select(None, scores, forced, (count, top_p, head_count, head_mass), 1.0, out).run()
    return out


def _lists(
    like: torch.Tensor, nk: int, forced: torch.Tensor | None, count: int, top_p: float | None, stats: bool
) -> Lists:
    """Allocate the results for ``like`` (B, H, nq, ...), as wide as a row can get; the last two only with ``stats``."""
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
    head_count: torch.Tensor | None,
    head_mass: torch.Tensor | None,
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
    head_count: torch.Tensor | None,
    head_mass: torch.Tensor | None,
    stats: bool,
) -> Lists:
    return _lists(scores, scores.shape[-1], forced, count, top_p, stats)


# -- plans -------------------------------------------------------------------------------------------------------------


def plan_select(
    pooled: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None,
    scores: torch.Tensor | None,
    forced: torch.Tensor | None,
    budget: BudgetArguments,
    scale: float,
    out: Lists,
) -> Launch:
    """Prepare the launch that fills ``out`` from pooled queries, keys and counts, or from scores."""
    kv_indices, kv_num_blocks, selected_mass, bits = out
    batch, heads, nq = kv_num_blocks.shape
    count, top_p, *tables = budget
    head_count, head_mass = (None if x is None else x.expand(batch, heads) for x in tables)
    q_mean, k_mean, counts = pooled or (None, None, None)
    if k_mean is not None:
        nk, dim, ratio = k_mean.shape[2], k_mean.shape[3], heads // k_mean.shape[1]
    else:
        assert scores is not None
        nk, dim, ratio = scores.shape[-1], 16, 1
    width = max(32, triton.next_power_of_2(nk))
    fixed = None if forced is None else _expanded(forced, batch, heads, nq, nk)
    rows = max(1, min(16, (MAX_REGISTER_SCORES if fixed is None else MAX_REGISTER_SCORES // 2) // width))
    tiles = ceil_div(nq, rows)
    s_strides = (0, 0, 0, 0) if scores is None else scores.stride()
    f_strides = (0, 0, 0, 0) if fixed is None else fixed.stride()
    arguments = {
        "q_mean": q_mean, "k_mean": k_mean, "counts": counts, "scores": scores, "forced": fixed,
        "kv_indices": kv_indices, "kv_num_blocks": kv_num_blocks, "selected_mass": selected_mass, "bits": bits,
        "nq": nq, "nk": nk, "heads": heads, "ratio": ratio, "kcap": kv_indices.shape[-1], "words": ceil_div(nk, 32),
        "tiles": tiles, "scale": scale, "budget": max(1, count), "top_p": 1.0 if top_p is None else top_p,
        "head_count": head_count, "head_mass": head_mass,
        "counts_b": 0 if counts is None else counts.stride(0),
        **dict(zip(("s_b", "s_h", "s_q", "s_k"), s_strides)), **dict(zip(("f_b", "f_h", "f_q", "f_k"), f_strides)),
        **dict(zip(("n_b", "n_h"), (0, 0) if head_count is None else head_count.stride())),
        **dict(zip(("p_b", "p_h"), (0, 0) if head_mass is None else head_mass.stride())),
        "DIM": dim, "CHUNK": 16, "ROWS": rows, "NK": width, "PRECISION": "ieee",
        "GIVEN": scores is not None, "TOP_P": top_p is not None, "FORCED": fixed is not None,
        "STATS": selected_mass.ndim > 1, "HEAD_COUNT": head_count is not None,
        "HEAD_MASS": head_mass is not None,
    }  # fmt: skip
    warps = max(4, min(8, rows * width // 512))
    return Launch(select_kernel, batch * heads * tiles, arguments, warps, 1)


def _expanded(forced: torch.Tensor, *shape: int) -> torch.Tensor:
    """``forced`` as bytes, expanded to a shape without a copy."""
    return forced.view(torch.uint8).expand(shape)
