"""Block-sparse attention in plain torch: gather the key blocks of a tile, then two batched matrix products.

A tile is one query block of one head. Its key blocks are gathered side by side, and the tile is an ordinary dense
attention over them; tiles with equally many keys are computed together until a chunk fills the cache. Only existing
tokens are computed: the ragged query block is a chunk of its own, and a ragged key block, always the last of its list,
is cut off. Logits and softmax are fp32 (fp64 for fp64 input) unless rounded logits are requested; the second product
runs in the input's dtype where the device supports it.

Memory beyond q, k, v and o: one chunk, and a copy of the key blocks of one group of heads (of a single head when heads
are long; none where even that is large compared with the call: blocks are then gathered in place).
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch

from dit_attn.kernels.backends.gather.head_groups import HeadGroup, Precision, gather_heads, split_heads
from dit_attn.kernels.backends.gather.threads import LARGE, run_items, run_parts
from dit_attn.kernels.backends.gather.tile_buffers import TileBuffers, iter_chunks
from dit_attn.kernels.backends.gather.tiling import QueryTiles, TileBucket, iter_buckets, iter_query_tiles
from dit_attn.kernels.backends.gather.workspace import Workspace, borrow_workspace
from dit_attn.kernels.problem import LN2, LOG2E, NEG_INF, Problem

_CHUNK_BYTES = 1 << 20  # widened at a time
_SAFE = 100.0  # base-2 logits: a million terms of 2^100 still have a finite sum in fp32, and 2^-100 is still exact


def precision(dtype: torch.dtype, device: torch.device, rounded_logits: bool = False) -> Precision:
    """Return the dtypes of a computation on a device; ``rounded_logits`` multiplies q and k in their own dtype."""
    if dtype == torch.float64:
        return Precision(dtype, dtype, dtype)
    wide = torch.float32
    native = device.type != "cpu" or (dtype == torch.bfloat16 and cpu_has_bf16())
    return Precision(dtype if rounded_logits else wide, wide, dtype if native else wide)


@torch.compiler.assume_constant_result
def cpu_has_bf16() -> bool:
    """Return whether the CPU has bf16 matrix instructions; without, bf16 is emulated and slower than fp32."""
    return any(
        getattr(torch.cpu, name, lambda: False)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    )


def gather_attention(problem: Problem, rounded_logits: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute o (B, Sq, H, Dv) in q's dtype and lse (B, H, Sq) fp32 (fp64 for fp64), natural logarithm.

    Args:
        problem: the call.
        rounded_logits: multiply q and k in their own dtype. A CPU rounds the result of a bf16 product, so the logits
            have 8 bits: about twice the error at more than 1.5 times the speed (docs/kernels.md has both figures).
    """
    q, v = problem.q, problem.v
    kind = precision(q.dtype, q.device, rounded_logits)
    out = q.new_empty(*q.shape[:3], v.shape[-1])
    lse = torch.empty(q.shape[0], q.shape[2], q.shape[1], dtype=kind.logits, device=q.device)
    large = problem.on_host and out.numel() > LARGE
    split = split_heads(problem, kind, torch.get_num_threads() if large else 1, allow_in_place=True)

    def heads(index: int) -> None:
        with borrow_workspace() as workspace:
            group = gather_heads(problem, kind, split, index, workspace)
            norms = _key_norms(problem, group)
            for tiles in iter_query_tiles(problem, group):
                _forward_tiles(problem, group, tiles, workspace, out, lse, norms)

    run_items(heads, len(split.ranges), q.device, at_once=large and split.fits)
    return out, lse


@dataclass(frozen=True)
class _Result:
    """Results that the chunks write: o (tiles, tokens, Dv), row maxima and row sums (tiles, tokens, 1) in base 2.

    With ``late``, o is divided by the sums rather than the probabilities.
    """

    o: torch.Tensor
    top: torch.Tensor
    total: torch.Tensor
    late: bool


def _forward_tiles(
    problem: Problem,
    group: HeadGroup,
    tiles: QueryTiles,
    workspace: Workspace,
    out: torch.Tensor,
    lse: torch.Tensor,
    norms: torch.Tensor | None,
) -> None:
    q = tiles.split(problem.q, group.batch)
    shape = (len(q), tiles.tokens, out.shape[-1])
    o = tiles.split(out, group.batch) if tiles.is_view else workspace.get("out", out.dtype, out.device, *shape)
    stats = torch.zeros(2, len(q), tiles.tokens, 1, dtype=lse.dtype, device=out.device)
    result = _Result(o, stats[0], stats[1], late=out.dtype == group.v.dtype == group.logits)
    limit = None if norms is None else _limit(group, tiles, q)
    for bucket in iter_buckets(problem, tiles):
        bounded = False
        if norms is not None and limit is not None:
            bounded = bool(norms.index_select(0, bucket.rows).amax() < limit)
        _forward_bucket(problem, group, tiles, bucket, workspace, q, result, bounded)
    if not problem.on_host or int(tiles.count.min()) == 0:  # tiles without keys are uninitialized
        o.masked_fill_((tiles.count == 0)[:, None, None], 0.0)
    if not tiles.is_view:
        tiles.write(out, group.batch, o)
    sums = result.top.add_(torch.log2(result.total)).mul_(LN2)
    lse[group.batch, tiles.heads, tiles.rows] = sums.view(tiles.heads.stop - tiles.heads.start, -1)


def _forward_bucket(
    problem: Problem,
    group: HeadGroup,
    tiles: QueryTiles,
    bucket: TileBucket,
    workspace: Workspace,
    q: torch.Tensor,
    result: _Result,
    bounded: bool,
) -> None:
    def part(first: int, last: int) -> None:
        with borrow_workspace() if (first, last) != (0, bucket.n) else nullcontext(workspace) as own:
            for buffers, low, high in iter_chunks(problem, group, tiles, bucket, own, first, last):
                _forward_chunk(buffers, low, high, q, result, bounded)

    run_parts(part, bucket.n, q.device)


def _key_norms(problem: Problem, group: HeadGroup) -> torch.Tensor | None:
    """(key heads * nk,) largest key norm of every block, in base-2 logits per unit of q; ``None`` if it would not help.

    Where they bound every logit of a tile by +-``_SAFE``, its softmax needs no maximum subtracted. Computing them is
    linear in the sequence and saves two passes over the logits.
    """
    if not problem.on_host or group.bias is not None:
        return None
    norms = _norms(group.k.rows.view(len(group.k.rows), problem.layout.kv_block, -1), group.logits)
    if group.k.tail is not None:
        norms = torch.cat([norms, _norms(group.k.tail[None], group.logits)])
    return norms * (abs(problem.scale) * LOG2E)


def _limit(group: HeadGroup, tiles: QueryTiles, q: torch.Tensor) -> torch.Tensor:
    """The key norm up to which no logit can exceed +-``_SAFE``, by |q k| <= |q| |k|. NaN bounds nothing."""
    room = torch.tensor(_SAFE)
    if group.low_rank is not None and tiles.rank_q is not None:
        columns = group.low_rank.view(-1, tiles.rank_q.shape[-1])
        room = room - LOG2E * columns.norm(dim=-1).amax() * tiles.rank_q.norm(dim=-1).amax()
    return room / _norms(q, group.logits).amax()


def _norms(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(n,) largest norm among the vectors of each x (n, tokens, D), in chunks because torch widens its input."""
    at_once = max(1, _CHUNK_BYTES // max(x[0].numel() * dtype.itemsize, 1)) if x.device.type == "cpu" else len(x)
    largest = torch.empty(len(x), dtype=dtype, device=x.device)

    def part(first: int, last: int) -> None:
        for tiles, found in zip(x[first:last].split(at_once), largest[first:last].split(at_once)):
            torch.amax(torch.linalg.vector_norm(tiles, dim=-1, dtype=dtype), -1, out=found)

    run_parts(part, len(x), x.device, large=x.numel() > LARGE)
    return largest


def _forward_chunk(buffers: TileBuffers, low: int, high: int, q: torch.Tensor, result: _Result, bounded: bool) -> None:
    bucket = buffers.bucket
    s = buffers.logits(q, low, high)
    if not bounded:
        top = bucket.slot(result.top, low, high)
        torch.amax(s, -1, keepdim=True, out=top)
        if buffers.may_be_empty:
            top.masked_fill_(top == NEG_INF, 0.0)
        bucket.put(result.top, low, high, top)
        s.sub_(top)
    p = s.exp2_()
    total = bucket.slot(result.total, low, high)
    torch.sum(p, -1, keepdim=True, out=total)
    bucket.put(result.total, low, high, total)
    v = buffers.values(low, high)
    if not result.late:  # weights that sum to 1 are rounded once, and so is the output
        p.mul_(_inverse(total) if buffers.may_be_empty else total.reciprocal())
    if buffers.p is not buffers.s:
        p = buffers.p.copy_(p)
    in_place = buffers.in_order and result.o.is_contiguous() and result.o.dtype == v.dtype
    o = torch.bmm(p, v, out=result.o[low:high] if in_place else buffers.o)
    if result.late:
        o.mul_(_inverse(total))
    if not in_place:
        bucket.put(result.o, low, high, o)


def _inverse(total: torch.Tensor) -> torch.Tensor:
    """1 / total, and 1 for a row without keys."""
    return total.masked_fill(total == 0.0, 1.0).reciprocal_()
