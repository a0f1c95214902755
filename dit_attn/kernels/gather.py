"""Block-sparse attention with nothing but torch: gather the selected key blocks of a tile, then two matrix products.

A tile is one query block of one head. The key blocks it reads are copied side by side, and the tile is an ordinary
dense attention over them; tiles with equally many keys are computed together until a chunk fills the cache. Only the
tokens that exist are computed: the ragged query block is a chunk of its own, and a ragged key block, always the last of
its list, is cut off. Logits and softmax are fp32 (fp64 for fp64 input) whatever the input; the second product runs in
the input's precision where the device has it.

Memory beyond q, k, v and o: the key blocks of one group of heads (a single head when heads are long) and one chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dit_attn.kernels.tiling import (
    LN2,
    LOG2E,
    NONE,
    Bucket,
    Group,
    Part,
    Precision,
    Problem,
    Scratch,
    buckets,
    groups,
    parts,
    scratch_memory,
    tiles_at_a_time,
    unread_keys,
)


def precision(dtype: torch.dtype, device: torch.device) -> Precision:
    """How input of a type is computed on a device."""
    if dtype == torch.float64:
        return Precision(dtype, dtype)
    native = device.type != "cpu" or (dtype == torch.bfloat16 and _cpu_has_bf16())
    return Precision(torch.float32, dtype if native else torch.float32)


def _cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bf16 itself; otherwise it is emulated and slower than fp32."""
    return any(
        getattr(torch.cpu, name, lambda: False)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    )


def gather_attention(problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """Forward pass: o (B, Sq, H, Dv) in q's type, lse (B, H, Sq) fp32 (fp64 for fp64), natural logarithm."""
    q, v = problem.q, problem.v
    kind = precision(q.dtype, q.device)
    out = q.new_empty(*q.shape[:3], v.shape[-1])
    lse = torch.empty(q.shape[0], q.shape[2], q.shape[1], dtype=kind.logits, device=q.device)
    with scratch_memory() as scratch:
        for group in groups(problem, kind, scratch):
            for part in parts(problem, group):
                _forward_part(problem, group, part, scratch, out, lse)
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
    problem: Problem, group: Group, part: Part, scratch: Scratch, out: torch.Tensor, lse: torch.Tensor
) -> None:
    q = part.tiles(problem.q, group.batch)
    shape = (len(q), part.tokens, out.shape[-1])
    o = part.tiles(out, group.batch) if part.is_view else scratch.get("out", out.dtype, out.device, *shape)
    stats = torch.zeros(2, len(q), part.tokens, 1, dtype=lse.dtype, device=out.device)
    result = _Result(o, stats[0], stats[1], late=out.dtype == group.v.dtype == group.k.dtype)
    for bucket in buckets(problem, part):
        step = tiles_at_a_time(group, part, bucket)
        for low in range(0, bucket.n, step):
            _forward_chunk(problem, group, part, bucket, low, min(low + step, bucket.n), q, result, scratch)
    if result.late:
        o.mul_(_inverse(result.total))
    if not problem.on_host or int(part.count.min()) == 0:  # tiles without keys hold what the memory held
        o.masked_fill_((part.count == 0)[:, None, None], 0.0)
    if not part.is_view:
        part.put(out, group.batch, o)
    sums = result.top.add_(torch.log2(result.total)).mul_(LN2)
    lse[group.batch, part.heads, part.rows] = sums.view(part.heads.stop - part.heads.start, -1)


def _forward_chunk(
    problem: Problem,
    group: Group,
    part: Part,
    bucket: Bucket,
    low: int,
    high: int,
    q: torch.Tensor,
    result: _Result,
    scratch: Scratch,
) -> None:
    s = chunk_logits(problem, group, part, bucket, low, high, q, scratch)
    top, total = bucket.slot(result.top, low, high), bucket.slot(result.total, low, high)
    torch.amax(s, -1, keepdim=True, out=top)
    if group.bias is not None or not problem.on_host:
        top.masked_fill_(top == NONE, 0.0)
    p = s.sub_(top).exp2_()
    torch.sum(p, -1, keepdim=True, out=total)
    bucket.put(result.top, low, high, top)
    bucket.put(result.total, low, high, total)
    v = gathered(group.v, bucket, low, high, "v", scratch).view(high - low, -1, result.o.shape[-1])[:, : bucket.keys]
    if not result.late:  # weights that sum to 1 are rounded once, and so is the output
        p.mul_(_inverse(total))
        p = p if p.dtype == v.dtype else scratch.get("p", v.dtype, v.device, *p.shape).copy_(p)
    if bucket.members is None and result.o.is_contiguous() and result.o.dtype == v.dtype:
        torch.bmm(p, v, out=result.o[low:high])
    else:
        o = scratch.get("o", v.dtype, v.device, high - low, *result.o.shape[1:])
        bucket.put(result.o, low, high, torch.bmm(p, v, out=o))


def _inverse(total: torch.Tensor) -> torch.Tensor:
    """1 / total, and 1 for a row that reads nothing."""
    return total.masked_fill(total == 0.0, 1.0).reciprocal_()


def chunk_logits(
    problem: Problem,
    group: Group,
    part: Part,
    bucket: Bucket,
    low: int,
    high: int,
    q: torch.Tensor,
    scratch: Scratch,
) -> torch.Tensor:
    """(n, tokens, keys) in base-2 units: scale * q k + bias, ``-inf`` where a gathered key is not read.

    Args:
        low, high: tiles of the bucket.
        q: (tiles, tokens, D), all tiles of the part.
    """
    n, dtype = high - low, group.k.dtype
    rows = bucket.of(q, low, high)
    if rows.dtype != dtype:
        rows = scratch.get("q", dtype, q.device, *rows.shape).copy_(rows)
    k = gathered(group.k, bucket, low, high, "k", scratch).view(n, -1, q.shape[-1])[:, : bucket.keys]
    s = scratch.get("s", dtype, q.device, n, part.tokens, bucket.keys)
    torch.baddbmm(s, rows, k.transpose(1, 2), beta=0, alpha=problem.scale * LOG2E, out=s)
    if group.bias is not None and bucket.bias_rows is not None:
        bias = group.bias.flatten(0, 1).index_select(0, bucket.bias_rows[low * bucket.width : high * bucket.width])
        s.add_(bias.view(n, 1, -1)[..., : bucket.keys])
    if not problem.on_host:
        s.masked_fill_(unread_keys(problem, part, low, high), NONE)
    return s


def gathered(source: torch.Tensor, bucket: Bucket, low: int, high: int, name: str, scratch: Scratch) -> torch.Tensor:
    """(n * width, kv_block * D): the key blocks of some tiles of a bucket, one after the other."""
    rows = bucket.rows[low * bucket.width : high * bucket.width]
    n = (high - low) * bucket.width
    return torch.index_select(source, 0, rows, out=scratch.get(name, source.dtype, source.device, n, source.shape[1]))
