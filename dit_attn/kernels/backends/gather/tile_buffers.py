"""Buffers for a chunk of query tiles, and the steps that fill them: logits and gathered values."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from dit_attn.kernels.backends.gather.head_groups import HeadGroup
from dit_attn.kernels.backends.gather.tiling import QueryTiles, TileBucket, TileMask
from dit_attn.kernels.backends.gather.workspace import Workspace
from dit_attn.kernels.device import chunk_sizes
from dit_attn.kernels.problem import LOG2E, NEG_INF, Problem


class TileBuffers:
    """Buffers for ``n`` tiles of a bucket, in every shape in which they are used."""

    def __init__(
        self, problem: Problem, group: HeadGroup, tiles: QueryTiles, bucket: TileBucket, n: int, workspace: Workspace
    ) -> None:
        self.problem, self.group, self.tiles, self.bucket, self.n = problem, group, tiles, bucket, n
        self.workspace = workspace
        device, kind, kind_v = problem.q.device, group.k.dtype, group.v.dtype
        wide = group.logits
        dim, dim_v = problem.q.shape[-1], problem.v.shape[-1]
        self.q = workspace.get("q", kind, device, n, tiles.tokens, dim)
        self.k_blocks = workspace.get("k", kind, device, n * bucket.width, group.k.width)
        self.v_blocks = workspace.get("v", kind_v, device, n * bucket.width, group.v.width)
        self.k = self.k_blocks.view(n, -1, dim)[:, : bucket.keys]
        self.kt = self.k.transpose(1, 2)
        self.v = self.v_blocks.view(n, -1, dim_v)[:, : bucket.keys]
        self.s = workspace.get("s", wide, device, n, tiles.tokens, bucket.keys)
        self.qk = self.s if kind == wide else workspace.get("qk", kind, device, *self.s.shape)
        spare = self.qk if kind == kind_v else workspace.get("p", kind_v, device, *self.s.shape)
        self.p = self.s if kind_v == wide else spare
        self.o = workspace.get("o", kind_v, device, n, tiles.tokens, dim_v)
        self.may_be_empty = group.bias is not None or tiles.mask is not None or not problem.on_host
        self.in_order = bucket.members is None

    def logits(self, q: torch.Tensor, low: int, high: int) -> torch.Tensor:
        """Compute (n, tokens, keys) logits in base 2: scale * q k + bias, ``-inf`` where a gathered key is masked.

        Args:
            q: (tiles, tokens, D), all query tiles.
            low, high: range of the bucket's tiles, ``n`` of them.
        """
        bucket = self.bucket
        rows = bucket.of(q, low, high)
        if rows.dtype != self.q.dtype:
            rows = self.q.copy_(rows)
        places = slice(low * bucket.width, high * bucket.width)
        self.group.k.gather(bucket.rows[places], self.k_blocks, self.workspace)
        torch.baddbmm(self.qk, rows, self.kt, beta=0, alpha=self.problem.scale * LOG2E, out=self.qk)
        s = self.s if self.qk is self.s else self.s.copy_(self.qk)
        if self.group.low_rank is not None and self.tiles.rank_q is not None and bucket.rank_rows is not None:
            left = bucket.of(self.tiles.rank_q, low, high).to(s.dtype)
            right = self.group.low_rank.index_select(0, bucket.rank_rows[places]).view(self.n, -1, left.shape[-1])
            torch.baddbmm(s, left, right[:, : bucket.keys].transpose(1, 2), alpha=LOG2E, out=s)
        if self.group.bias is not None and bucket.bias_rows is not None:
            bias = self.group.bias.flatten(0, 1).index_select(0, bucket.bias_rows[places])
            s.add_(bias.view(self.n, 1, -1)[..., : bucket.keys])
        if not self.problem.on_host:
            s.masked_fill_(self.unattended(low, high), NEG_INF)
        if self.tiles.mask is not None:
            self._hide(s, self.tiles.mask, low, high)
        return s

    def _hide(self, s: torch.Tensor, mask: TileMask, low: int, high: int) -> None:
        """Write ``-inf`` to pairs that the element mask leaves out; on a host, from the first entry that needs it."""
        layout, bucket, first = self.problem.layout, self.bucket, 0
        everything = torch.arange(low, high, device=s.device)
        tiles = everything if bucket.members is None else bucket.members[low:high]
        if self.problem.on_host:  # the ragged key block may be the last full entry
            first = max(0, int(mask.full[tiles].min()) - (layout.kv_len % layout.kv_block != 0))
        if first == bucket.width:
            return
        s = s[..., first * layout.kv_block :]
        factors = None
        if self.problem.on_host:
            factors = mask.elements.factors(mask.at(layout, self.tiles.tokens, tiles, first, bucket.width))
        if factors is None:
            s.masked_fill_(mask.hidden(layout, self.tiles.tokens, tiles, first, bucket.width), NEG_INF)
            return
        for allowed, row in factors:  # torch adds ten times as fast as it compares or fills
            rows = s.new_zeros(allowed.shape).masked_fill_(~allowed, NEG_INF)
            index = row + torch.arange(len(row), device=row.device)[:, None] * rows.shape[1]
            buffer = self.workspace.get("hidden", s.dtype, s.device, index.numel(), s.shape[2])
            s.add_(torch.index_select(rows.flatten(0, 1), 0, index.flatten(), out=buffer).view_as(s))

    def values(self, low: int, high: int) -> torch.Tensor:
        """Gather the values (n, keys, Dv) of tiles ``low:high``."""
        bucket = self.bucket
        places = slice(low * bucket.width, high * bucket.width)
        self.group.v.gather(bucket.rows[places], self.v_blocks, self.workspace)
        return self.v

    def unattended(self, low: int, high: int) -> torch.Tensor:
        """Return (n, 1, keys) bool, True for gathered keys past the row's count or past the sequence."""
        layout = self.problem.layout
        idx, count = self.tiles.idx[low:high], self.tiles.count[low:high]
        beyond = torch.arange(idx.shape[1], device=idx.device) >= count[:, None]
        token = idx[..., None] % layout.nk * layout.kv_block + torch.arange(layout.kv_block, device=idx.device)
        return (beyond[..., None] | (token >= layout.kv_len)).flatten(1)[:, None]


def iter_chunks(
    problem: Problem,
    group: HeadGroup,
    tiles: QueryTiles,
    bucket: TileBucket,
    workspace: Workspace,
    first: int = 0,
    last: int | None = None,
) -> Iterator[tuple[TileBuffers, int, int]]:
    """Iterate over the bucket's tiles ``first:last``, as many at a time as fill the chunk size of all threads."""
    threads = torch.get_num_threads() if problem.on_host else 1
    gathered = bucket.width * sum(table.width * table.dtype.itemsize for table in (group.k, group.v))
    per_tile = gathered + bucket.keys * tiles.tokens * group.k.dtype.itemsize
    step = max(1, threads * chunk_sizes(tiles.idx.device).chunk // per_tile)
    step -= step % threads if step > threads else 0  # equally many tiles per thread
    buffers = None
    last = bucket.n if last is None else last
    for low in range(first, last, step):
        high = min(low + step, last)
        if buffers is None or buffers.n != high - low:
            buffers = TileBuffers(problem, group, tiles, bucket, high - low, workspace)
        yield buffers, low, high
