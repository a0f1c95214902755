"""Block-sparse attention with nothing but torch: gather the selected key blocks of a tile, then two matrix products.

A tile is one query block of one head. The key blocks it reads are copied side by side, and the tile is an ordinary
dense attention over them; tiles with equally many keys are computed together until a chunk fills the cache. Only the
tokens that exist are computed: the ragged query block is a chunk of its own, and a ragged key block, always the last of
its list, is cut off. Logits and softmax are fp32 (fp64 for fp64 input) unless rounded logits are asked for; the second
product runs in the input's precision where the device has it.

Memory beyond q, k, v and o: one chunk, and the key blocks of one group of heads: of a single head when heads are long,
and of none where even that is large beside the call; blocks are then gathered from where they stand.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dit_attn.kernels.scratch import Scratch, scratch_memory
from dit_attn.kernels.tiling import (
    LN2,
    LOG2E,
    NONE,
    Group,
    Part,
    Precision,
    Problem,
    Work,
    buckets,
    chunks,
    groups,
    parts,
)

_PIECE = 1 << 20  # bytes that are widened at a time
_SAFE = 100.0  # base-2 logits: a million terms of 2^100 still have a finite sum in fp32, and 2^-100 is still exact


def precision(dtype: torch.dtype, device: torch.device, rounded_logits: bool = False) -> Precision:
    """How input of a type is computed on a device; ``rounded_logits`` multiplies q and k in their own type."""
    if dtype == torch.float64:
        return Precision(dtype, dtype, dtype)
    wide = torch.float32
    native = device.type != "cpu" or (dtype == torch.bfloat16 and cpu_has_bf16())
    return Precision(dtype if rounded_logits else wide, wide, dtype if native else wide)


def cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bf16 itself; otherwise it is emulated and slower than fp32."""
    return any(
        getattr(torch.cpu, name, lambda: False)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    )


def gather_attention(problem: Problem, rounded_logits: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Forward pass: o (B, Sq, H, Dv) in q's type, lse (B, H, Sq) fp32 (fp64 for fp64), natural logarithm.

    Args:
        problem: the call.
        rounded_logits: multiply q and k in their own type. The CPU's bf16 product rounds its result, so the logits
            carry 8 bits then: about twice the error, for over half again the speed (docs/kernels.md has both).
    """
    q, v = problem.q, problem.v
    kind = precision(q.dtype, q.device, rounded_logits)
    out = q.new_empty(*q.shape[:3], v.shape[-1])
    lse = torch.empty(q.shape[0], q.shape[2], q.shape[1], dtype=kind.logits, device=q.device)
    with scratch_memory() as scratch:
        for group in groups(problem, kind, scratch, may_stay=True):
            norms = _key_norms(problem, group)
            for part in parts(problem, group):
                _forward_part(problem, group, part, scratch, out, lse, norms)
    return out, lse


@dataclass(frozen=True)
class _Result:
    """What the chunks of a part write: o (tiles, tokens, Dv), row maxima and row sums (tiles, tokens, 1), base 2.

    ``late`` says that o is divided by the sums only when all chunks are done.
    """

    o: torch.Tensor
    top: torch.Tensor
    total: torch.Tensor
    late: bool


def _forward_part(
    problem: Problem,
    group: Group,
    part: Part,
    scratch: Scratch,
    out: torch.Tensor,
    lse: torch.Tensor,
    norms: torch.Tensor | None,
) -> None:
    q = part.tiles(problem.q, group.batch)
    shape = (len(q), part.tokens, out.shape[-1])
    o = part.tiles(out, group.batch) if part.is_view else scratch.get("out", out.dtype, out.device, *shape)
    stats = torch.zeros(2, len(q), part.tokens, 1, dtype=lse.dtype, device=out.device)
    result = _Result(o, stats[0], stats[1], late=out.dtype == group.v.dtype == group.logits)
    limit = None if norms is None else _limit(group, part, q)
    for bucket in buckets(problem, part):
        bounded = False
        if norms is not None and limit is not None:
            bounded = bool(norms.index_select(0, bucket.rows).amax() < limit)
        for work, low, high in chunks(problem, group, part, bucket, scratch):
            _forward_chunk(work, low, high, q, result, bounded)
    if result.late:
        o.mul_(_inverse(result.total))
    if not problem.on_host or int(part.count.min()) == 0:  # tiles without keys hold what the memory held
        o.masked_fill_((part.count == 0)[:, None, None], 0.0)
    if not part.is_view:
        part.put(out, group.batch, o)
    sums = result.top.add_(torch.log2(result.total)).mul_(LN2)
    lse[group.batch, part.heads, part.rows] = sums.view(part.heads.stop - part.heads.start, -1)


def _key_norms(problem: Problem, group: Group) -> torch.Tensor | None:
    """(key heads * nk,) the longest key of every block, in base-2 logits per unit of q; ``None`` if it would not help.

    Where they show that no logit of a tile can leave +-``_SAFE``, its softmax needs no maximum taken off. The norms are
    linear in the sequence and save two passes over the logits.
    """
    if not problem.on_host or group.bias is not None:
        return None
    norms = _norms(group.k.rows.view(len(group.k.rows), problem.layout.kv_block, -1), group.logits)
    if group.k.tail is not None:
        norms = torch.cat([norms, _norms(group.k.tail[None], group.logits)])
    return norms * (abs(problem.scale) * LOG2E)


def _limit(group: Group, part: Part, q: torch.Tensor) -> torch.Tensor:
    """Up to which norm of the keys no logit of a part can leave +-``_SAFE``: |q k| <= |q| |k|. NaN bounds nothing."""
    room = torch.tensor(_SAFE)
    if group.low_rank is not None and part.rank_q is not None:
        columns = group.low_rank.view(-1, part.rank_q.shape[-1])
        room = room - LOG2E * columns.norm(dim=-1).amax() * part.rank_q.norm(dim=-1).amax()
    return room / _norms(q, group.logits).amax()


def _norms(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(n,) norm of the longest of every ``tokens`` vectors of x (n, tokens, D), in pieces: torch widens its input."""
    at_once = max(1, _PIECE // max(x[0].numel() * dtype.itemsize, 1)) if x.device.type == "cpu" else len(x)
    return torch.cat([torch.linalg.vector_norm(part, dim=-1, dtype=dtype).amax(-1) for part in x.split(at_once)])


def _forward_chunk(work: Work, low: int, high: int, q: torch.Tensor, result: _Result, bounded: bool) -> None:
    bucket = work.bucket
    s = work.logits(q, low, high)
    if not bounded:
        top = bucket.slot(result.top, low, high)
        torch.amax(s, -1, keepdim=True, out=top)
        if work.may_be_empty:
            top.masked_fill_(top == NONE, 0.0)
        bucket.put(result.top, low, high, top)
        s.sub_(top)
    p = s.exp2_()
    total = bucket.slot(result.total, low, high)
    torch.sum(p, -1, keepdim=True, out=total)
    bucket.put(result.total, low, high, total)
    v = work.values(low, high)
    if not result.late:  # weights that sum to 1 are rounded once, and so is the output
        p.mul_(_inverse(total) if work.may_be_empty else total.reciprocal())
    if work.p is not work.s:
        p = work.p.copy_(p)
    if work.straight and result.o.is_contiguous() and result.o.dtype == v.dtype:
        torch.bmm(p, v, out=result.o[low:high])
    else:
        bucket.put(result.o, low, high, torch.bmm(p, v, out=work.o))


def _inverse(total: torch.Tensor) -> torch.Tensor:
    """1 / total, and 1 for a row that reads nothing."""
    return total.masked_fill(total == 0.0, 1.0).reciprocal_()
