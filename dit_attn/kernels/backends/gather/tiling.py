"""Partition of a group of heads for the gather backend: tiles of equal query blocks, buckets of equal widths."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from dit_attn.kernels.backends.gather.head_groups import HeadGroup
from dit_attn.kernels.layouts.block_layout import BlockLayout
from dit_attn.kernels.layouts.element_masks import ElementMask, Tiles
from dit_attn.kernels.problem import Problem


@dataclass(frozen=True)
class TileMask:
    """The element mask of some query tiles.

    Attributes:
        elements: the rule.
        batch: batch row.
        full: (tiles,) number of full entries.
        heads, rows: (tiles,) int64, query head and query block.
        columns: (tiles, kcap) int64, key blocks.
    """

    elements: ElementMask
    batch: int
    full: torch.Tensor
    heads: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor

    def at(self, layout: BlockLayout, tokens: int, tiles: torch.Tensor, first: int, width: int) -> Tiles:
        """Return entries ``first:width`` of some of the tiles, as the rule takes them."""
        columns = self.columns[tiles, first:width]
        entries = torch.arange(first, width, device=columns.device) - self.full[tiles, None]
        blocks = (layout.q_block, layout.kv_block)
        return Tiles(self.batch, self.heads[tiles], self.rows[tiles], columns, entries, tokens, *blocks)

    def hidden(self, layout: BlockLayout, tokens: int, tiles: torch.Tensor, first: int, width: int) -> torch.Tensor:
        """Return (n, tokens, (width - first) * kv_block) bool, True for pairs of entries ``first:width`` to mask."""
        at = self.at(layout, tokens, tiles, first, width)
        columns, entries = at.columns, at.entries
        key = columns[..., None] * layout.kv_block + torch.arange(layout.kv_block, device=columns.device)
        full = (entries < 0)[..., None].expand_as(key).flatten(1)
        attended = self.elements.allowed_pairs(at) | full[:, None]
        return ~attended | (key >= layout.kv_len).flatten(1)[:, None]


@dataclass(frozen=True)
class QueryTiles:
    """The tiles of equally long query blocks of some heads of a group: of the full blocks, or of the ragged one.

    Attributes:
        heads: range of query heads.
        rows: range of queries.
        tokens: queries per tile.
        idx: (tiles, kcap) int64, rows of the group's k and v.
        count: (tiles,) key blocks per tile.
        bias_idx: (tiles, kcap) int64, rows of the group's bias, or ``None``.
        mask: which pairs of partial entries are attended to, or ``None`` when all entries are full.
        rank_idx: (tiles, kcap) int64, rows of the group's low-rank bias, or ``None``.
        rank_q: (tiles, tokens, R), its query side.
    """

    heads: slice
    rows: slice
    tokens: int
    idx: torch.Tensor
    count: torch.Tensor
    bias_idx: torch.Tensor | None
    mask: TileMask | None = None
    rank_idx: torch.Tensor | None = None
    rank_q: torch.Tensor | None = None

    @property
    def is_view(self) -> bool:
        """Whether :meth:`split` shares memory with its argument."""
        return self.heads.stop - self.heads.start == 1

    def split(self, x: torch.Tensor, batch: int) -> torch.Tensor:
        """Return the tiles (tiles, tokens, D) of x (B, S, H, D): a view for a single head."""
        return x[batch, self.rows, self.heads].transpose(0, 1).unflatten(1, (-1, self.tokens)).flatten(0, 1)

    def write(self, x: torch.Tensor, batch: int, tiles: torch.Tensor) -> None:
        """Write tiles (tiles, tokens, D) into x (B, S, H, D); the reverse of :meth:`split`."""
        heads = self.heads.stop - self.heads.start
        x[batch, self.rows, self.heads] = tiles.view(heads, -1, x.shape[-1]).transpose(0, 1)


@dataclass(frozen=True)
class TileBucket:
    """Query tiles with equally many keys.

    Attributes:
        members: (n,) int64, indices of the tiles; ``None`` for all of them, in order.
        n: number of tiles.
        width: key blocks per tile.
        keys: keys per tile.
        rows: (n * width,) int64, the blocks to gather from the group's k and v.
        bias_rows, rank_rows: the same for the group's bias and low-rank bias, or ``None``.
    """

    members: torch.Tensor | None
    n: int
    width: int
    keys: int
    rows: torch.Tensor
    bias_rows: torch.Tensor | None
    rank_rows: torch.Tensor | None = None

    def of(self, x: torch.Tensor, low: int, high: int) -> torch.Tensor:
        """Return the bucket's tiles ``low:high`` of a tensor of all query tiles."""
        return x[low:high] if self.members is None else x.index_select(0, self.members[low:high])

    def slot(self, x: torch.Tensor, low: int, high: int) -> torch.Tensor:
        """Return a tensor to write tiles ``low:high`` to, a view if they are adjacent; pass it to :meth:`put`."""
        return x[low:high] if self.members is None else x.new_empty(high - low, *x.shape[1:])

    def put(self, x: torch.Tensor, low: int, high: int, value: torch.Tensor) -> None:
        """Write the bucket's tiles ``low:high`` into a tensor of all query tiles."""
        if self.members is not None:
            x.index_copy_(0, self.members[low:high], value.to(x.dtype))
        elif value._base is not x:  # not the slot itself
            x[low:high].copy_(value)


def iter_query_tiles(problem: Problem, group: HeadGroup) -> Iterator[QueryTiles]:
    """Iterate over the query tiles of a group: of all heads at once if it has several key heads, else by head."""
    layout, ratio = problem.layout, problem.ratio
    full = layout.q_len // layout.q_block
    step = (group.g1 - group.g0) * ratio if group.g1 - group.g0 > 1 else 1
    for h0 in range(group.g0 * ratio, group.g1 * ratio, step):
        heads = slice(h0, h0 + step)
        if full:
            yield _query_tiles(problem, group, heads, 0, full, layout.q_block)
        if full < layout.nq:
            yield _query_tiles(problem, group, heads, full, layout.nq, layout.q_len - full * layout.q_block)


def _query_tiles(problem: Problem, group: HeadGroup, heads: slice, first: int, last: int, tokens: int) -> QueryTiles:
    layout, ratio = problem.layout, problem.ratio
    local = _of_heads(layout.kv_indices, group.batch, heads)[:, first:last].long()
    count = _of_heads(layout.kv_num_blocks, group.batch, heads)[:, first:last]
    if not problem.on_host:  # entries past the count are gathered too: they repeat the row's first block
        attended = torch.arange(local.shape[-1], device=local.device) < count[..., None]
        local = torch.where(attended, local, local[..., :1]).clamp(0, layout.nk - 1)
    head = torch.arange(heads.start, heads.stop, device=local.device).view(-1, 1, 1)

    def of_table(table: torch.Tensor | None, table_heads: int) -> torch.Tensor | None:
        """Rows of the tiles' key blocks in a table of all query heads of the group, or of one for all."""
        if table is None:
            return None
        own = head - group.g0 * ratio if table_heads > 1 else torch.zeros_like(head)
        return (local + own * layout.nk).flatten(0, 1)

    bias, rank = group.bias, group.low_rank
    rows = slice(first * layout.q_block, first * layout.q_block + (last - first) * tokens)
    rank_q = None
    if problem.low_rank is not None:
        side = _of_heads(problem.low_rank[0], group.batch, heads)[:, rows]
        rank_q = side.unflatten(1, (-1, tokens)).flatten(0, 1)
    return QueryTiles(
        heads=heads,
        rows=rows,
        tokens=tokens,
        idx=(local + (head // ratio - group.g0) * layout.nk).flatten(0, 1),
        count=count.reshape(-1),
        bias_idx=of_table(bias, 0 if bias is None else bias.shape[0]),
        mask=_tile_mask(layout, group.batch, heads, first, local),
        rank_idx=of_table(rank, 0 if rank is None else len(rank) // layout.nk),
        rank_q=rank_q,
    )


def _tile_mask(layout: BlockLayout, batch: int, heads: slice, first: int, columns: torch.Tensor) -> TileMask | None:
    """The element mask of query blocks ``first ..`` with key blocks ``columns`` (heads, n, kcap)."""
    if layout.elements is None or layout.full_kv_num_blocks is None:
        return None
    n, device = columns.shape[1], columns.device
    return TileMask(
        elements=layout.elements,
        batch=batch,
        full=_of_heads(layout.full_kv_num_blocks, batch, heads)[:, first : first + n].reshape(-1),
        heads=torch.arange(heads.start, heads.stop, device=device).repeat_interleave(n),
        rows=torch.arange(first, first + n, device=device).repeat(heads.stop - heads.start),
        columns=columns.flatten(0, 1),
    )


def _of_heads(x: torch.Tensor, b: int, heads: slice) -> torch.Tensor:
    """(heads, ...) of a (B|1, H|1, ...) tensor."""
    x = x[b if x.shape[0] > 1 else 0]
    return x[heads] if x.shape[0] > 1 else x.expand(heads.stop - heads.start, *x.shape[1:])


def iter_buckets(problem: Problem, tiles: QueryTiles) -> Iterator[TileBucket]:
    """Iterate over tiles that can be computed together. On an accelerator: all of them, as wide as the lists."""
    layout = problem.layout
    missing = layout.nk * layout.kv_block - layout.kv_len
    if not problem.on_host:
        yield _bucket(tiles, None, tiles.idx.shape[1], tiles.idx.shape[1] * layout.kv_block)
        return
    if tiles.mask is not None:
        yield from _masked_buckets(layout, tiles, tiles.mask)
        return
    kinds = tiles.count.long() * 2
    if missing:  # the ragged key block is the last one of the lists it is in
        last_block = tiles.idx.gather(1, (tiles.count[:, None].long() - 1).clamp(min=0))[:, 0] % layout.nk
        kinds += (last_block == layout.nk - 1) & (tiles.count > 0)
    ordered, order = kinds.sort(stable=True)
    values, sizes = torch.unique_consecutive(ordered, return_counts=True)
    start = 0
    for value, size in zip(values.tolist(), sizes.tolist()):
        width, ragged = divmod(value, 2)
        if width:
            members = None if size == len(kinds) else order[start : start + size]
            yield _bucket(tiles, members, width, width * layout.kv_block - ragged * missing)
        start += size


def _masked_buckets(layout: BlockLayout, tiles: QueryTiles, mask: TileMask) -> Iterator[TileBucket]:
    """Tiles with equally many entries, sorted by their full ones: a chunk masks from its first partial one on."""
    order = (tiles.count.long() * (layout.nk + 1) + mask.full).argsort(stable=True)
    values, sizes = torch.unique_consecutive(tiles.count[order], return_counts=True)
    for width, members in zip(values.tolist(), order.split(sizes.tolist())):
        if width:
            yield _bucket(tiles, members, width, width * layout.kv_block)


def _bucket(tiles: QueryTiles, members: torch.Tensor | None, width: int, keys: int) -> TileBucket:
    def rows(idx: torch.Tensor | None) -> torch.Tensor | None:
        if idx is None:
            return None
        return (idx if members is None else idx.index_select(0, members))[:, :width].reshape(-1)

    n = len(tiles.idx) if members is None else len(members)
    own = rows(tiles.idx)
    assert own is not None
    return TileBucket(members, n, width, keys, own, rows(tiles.bias_idx), rows(tiles.rank_idx))
