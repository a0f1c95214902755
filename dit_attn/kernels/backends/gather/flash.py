"""Block-sparse attention by torch's CPU flash attention on the gathered key blocks of each query tile.

That kernel uses the processor's matrix instructions for 16-bit types (AMX through oneDNN) and keeps logits in fp32.
Tiles are its heads: it packs keys and values for these instructions only from four heads on.
"""

from __future__ import annotations

import torch

from dit_attn.kernels.backends.gather.head_groups import HeadGroup, Precision, gather_heads, split_heads
from dit_attn.kernels.backends.gather.threads import LARGE, run_items, run_parts
from dit_attn.kernels.backends.gather.tiling import QueryTiles, TileBucket, iter_buckets, iter_query_tiles
from dit_attn.kernels.backends.gather.workspace import borrow_workspace
from dit_attn.kernels.device import chunk_sizes, lse_dtype
from dit_attn.kernels.problem import LN2, NEG_INF, Problem

ROOM = 0.9  # of the limit of a head's copy: that kernel packs keys besides
TILES = 4  # fewest at a time, for the kernel to pack keys and values


def has_flash() -> bool:
    """Return whether this torch has flash attention for CPUs."""
    return hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu")


def gather_flash(problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute o (B, Sq, H, D) in q's dtype and lse (B, H, Sq) fp32 (fp64 for fp64), natural logarithm.

    Args:
        problem: the call, without a low-rank bias or an element mask.
    """
    q = problem.q
    kind = Precision(q.dtype, lse_dtype(q.dtype), q.dtype)
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.full((q.shape[0], q.shape[2], q.shape[1]), NEG_INF, dtype=kind.logits, device=q.device)
    large = out.numel() > LARGE
    split = split_heads(problem, kind, torch.get_num_threads() if large else 1, allow_in_place=True, room=ROOM)

    def heads(index: int) -> None:
        with borrow_workspace() as workspace:
            group = gather_heads(problem, kind, split, index, workspace)
            for tiles in iter_query_tiles(problem, group):
                _tiles(problem, group, tiles, out, lse)

    run_items(heads, len(split.ranges), q.device, at_once=large and split.fits)
    return out, lse


def _tiles(problem: Problem, group: HeadGroup, tiles: QueryTiles, out: torch.Tensor, lse: torch.Tensor) -> None:
    q = tiles.split(problem.q, group.batch)
    o = tiles.split(out, group.batch)  # a copy of zeros where it is no view
    sums = torch.full(q.shape[:2], NEG_INF, dtype=lse.dtype)
    for bucket in iter_buckets(problem, tiles):
        _bucket(problem, group, bucket, q, o, sums)
    if not tiles.is_view:
        tiles.write(out, group.batch, o)
    lse[group.batch, tiles.heads, tiles.rows] = sums.view(tiles.heads.stop - tiles.heads.start, -1)


def _bucket(
    problem: Problem, group: HeadGroup, bucket: TileBucket, q: torch.Tensor, o: torch.Tensor, sums: torch.Tensor
) -> None:
    gathered = bucket.width * (group.k.width + group.v.width) * q.dtype.itemsize
    step = max(TILES, chunk_sizes(q.device).chunk // gathered)

    def part(first: int, last: int) -> None:
        with borrow_workspace() as workspace:
            for low in range(first, last, step):
                n = min(last - low, step)
                places = slice(low * bucket.width, (low + n) * bucket.width)
                k, v = (
                    workspace.get(name, x.dtype, q.device, n * bucket.width, x.width)
                    for name, x in (("k", group.k), ("v", group.v))
                )
                group.k.gather(bucket.rows[places], k, workspace)
                group.v.gather(bucket.rows[places], v, workspace)
                mask = None
                if group.bias is not None and bucket.bias_rows is not None:
                    bias = group.bias.flatten(0, 1).index_select(0, bucket.bias_rows[places])
                    mask = bias.mul_(LN2).view(1, n, 1, -1)[..., : bucket.keys]
                    mask = mask.expand(1, n, q.shape[1], bucket.keys)
                found, total = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                    bucket.of(q, low, low + n)[None],
                    *(x.view(1, n, -1, q.shape[2])[:, :, : bucket.keys] for x in (k, v)),
                    attn_mask=mask,
                    scale=problem.scale,
                )
                if mask is not None:  # a row of masked keys has 0 there
                    total = total.masked_fill((mask == NEG_INF).all(-1), NEG_INF)
                bucket.put(o, low, low + n, found[0])
                bucket.put(sums, low, low + n, total[0])

    run_parts(part, bucket.n, q.device)
