"""How an attention call is cut for the gather path: groups of heads, parts of equal query blocks, buckets of tiles."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from dit_attn.kernels.layout import BlockLayout
from dit_attn.kernels.masks import ElementMask, Tiles
from dit_attn.kernels.scratch import Scratch
from dit_attn.kernels.table import Table, in_place, laid_out

LOG2E = math.log2(math.e)
LN2 = math.log(2.0)
NONE = float("-inf")


@dataclass(frozen=True)
class Budget:
    """Sizes that suit a device.

    Attributes:
        chunk: bytes of gathered keys, values and logits computed at a time, per thread.
        group: bytes of K and V, or of q and o, that are laid out in blocks at a time; a longer head is taken alone.
        virtual: bytes of logits against virtual keys that are computed at a time, several times over.
    """

    chunk: int
    group: int
    virtual: int


LAID_OUT = 0.25  # a copy of one head's K and V may take this part of q, k, v and o; else they are read where they are
BUDGETS = {"cpu": Budget(chunk=2 << 20, group=2 << 20, virtual=1 << 20)}  # what its cache holds
ACCELERATOR = Budget(chunk=256 << 20, group=512 << 20, virtual=256 << 20)  # what keeps it busy


def budget_of(device: torch.device) -> Budget:
    """The sizes for a device."""
    return BUDGETS.get(device.type, ACCELERATOR)


@dataclass(frozen=True)
class Precision:
    """Types: q and k are multiplied in one, the softmax runs in one, p and v are multiplied in one."""

    keys: torch.dtype
    logits: torch.dtype
    values: torch.dtype


@dataclass(frozen=True)
class Problem:
    """One checked call.

    Attributes:
        q: (B, Sq, H, D).
        k: (B, Sk, Hk, D).
        v: (B, Sk, Hk, Dv).
        layout: on the device of q.
        scale: softmax scale.
        key_mask: (B, Sk) bool or ``None``.
        key_bias: (B|1, H|1, Sk) or ``None``, natural logarithm.
        low_rank: (B|1, H|1, Sq, R) and (B|1, H|1, Sk, R), whose product is added to the logits; only the forward pass
            of the gather path knows it.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    layout: BlockLayout
    scale: float
    key_mask: torch.Tensor | None
    key_bias: torch.Tensor | None
    low_rank: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def ratio(self) -> int:
        """Query heads per key head."""
        return self.q.shape[2] // self.k.shape[2]

    @property
    def on_host(self) -> bool:
        """Whether counts can be read for free."""
        return self.q.device.type == "cpu"


@dataclass(frozen=True)
class Group:
    """Key heads ``g0:g1`` of one batch row, laid out in blocks.

    Attributes:
        batch, g0, g1: which.
        k, v: their blocks.
        bias: (heads|1, nk, kv_block) in base-2 units, ``-inf`` where no key is, or ``None``.
        logits: type the softmax runs in.
        low_rank: (heads|1 * nk, kv_block * R), the keys' side of the low-rank addition, or ``None``.
    """

    batch: int
    g0: int
    g1: int
    k: Table
    v: Table
    bias: torch.Tensor | None
    logits: torch.dtype
    low_rank: torch.Tensor | None = None


@dataclass(frozen=True)
class Rule:
    """What a part needs to know to hide the pairs that an element mask leaves out.

    Attributes:
        mask: the rule.
        batch: batch row.
        whole: (tiles,) entries that are read whole.
        heads, rows: (tiles,) int64, query head and query block.
        columns: (tiles, kcap) int64, key blocks.
    """

    mask: ElementMask
    batch: int
    whole: torch.Tensor
    heads: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor

    def hidden(self, layout: BlockLayout, tokens: int, tiles: torch.Tensor, first: int, width: int) -> torch.Tensor:
        """(n, tokens, (width - first) * kv_block) bool, True for pairs of entries ``first:width`` that are not read."""
        columns = self.columns[tiles, first:width]
        entries = torch.arange(first, width, device=columns.device) - self.whole[tiles, None]
        blocks = (layout.q_block, layout.kv_block)
        at = Tiles(self.batch, self.heads[tiles], self.rows[tiles], columns, entries, tokens, *blocks)
        key = columns[..., None] * layout.kv_block + torch.arange(layout.kv_block, device=columns.device)
        whole = (entries < 0)[..., None].expand_as(key).flatten(1)
        read = self.mask.read(at) | whole[:, None]
        return ~read | (key >= layout.kv_len).flatten(1)[:, None]


@dataclass(frozen=True)
class Part:
    """Equally long query blocks of some heads of a group: the whole ones, or the ragged one.

    Attributes:
        heads: query heads.
        rows: queries.
        tokens: queries per tile.
        idx: (tiles, kcap) int64, rows of the group's k and v.
        count: (tiles,) key blocks per tile.
        bias_idx: (tiles, kcap) int64, rows of the group's bias, or ``None``.
        rule: which pairs of partial entries are read, or ``None`` when all entries are whole.
        rank_idx: (tiles, kcap) int64, rows of the group's low-rank addition, or ``None``.
        rank_q: (tiles, tokens, R), the queries' side of it.
    """

    heads: slice
    rows: slice
    tokens: int
    idx: torch.Tensor
    count: torch.Tensor
    bias_idx: torch.Tensor | None
    rule: Rule | None = None
    rank_idx: torch.Tensor | None = None
    rank_q: torch.Tensor | None = None

    @property
    def is_view(self) -> bool:
        """Whether :meth:`tiles` shares memory with its argument."""
        return self.heads.stop - self.heads.start == 1

    def tiles(self, x: torch.Tensor, batch: int) -> torch.Tensor:
        """(tiles, tokens, D) of x (B, S, H, D): a view for a single head."""
        return x[batch, self.rows, self.heads].transpose(0, 1).unflatten(1, (-1, self.tokens)).flatten(0, 1)

    def put(self, x: torch.Tensor, batch: int, tiles: torch.Tensor) -> None:
        """The reverse of :meth:`tiles`: write (tiles, tokens, D) into x (B, S, H, D)."""
        heads = self.heads.stop - self.heads.start
        x[batch, self.rows, self.heads] = tiles.view(heads, -1, x.shape[-1]).transpose(0, 1)


@dataclass(frozen=True)
class Bucket:
    """Tiles of a part with equally many keys.

    Attributes:
        members: (n,) int64, which tiles; ``None`` for all of them, in order.
        n: how many.
        width: key blocks per tile.
        keys: keys per tile.
        rows: (n * width,) int64, what the tiles gather from the group's k and v.
        bias_rows, rank_rows: the same for the group's bias and low-rank addition, or ``None``.
    """

    members: torch.Tensor | None
    n: int
    width: int
    keys: int
    rows: torch.Tensor
    bias_rows: torch.Tensor | None
    rank_rows: torch.Tensor | None = None

    def of(self, x: torch.Tensor, low: int, high: int) -> torch.Tensor:
        """Tiles ``low:high`` of the bucket, from a per-tile tensor of the part."""
        return x[low:high] if self.members is None else x.index_select(0, self.members[low:high])

    def slot(self, x: torch.Tensor, low: int, high: int) -> torch.Tensor:
        """Where to write tiles ``low:high``: a view if they lie together. To be handed to :meth:`put`."""
        return x[low:high] if self.members is None else x.new_empty(high - low, *x.shape[1:])

    def put(self, x: torch.Tensor, low: int, high: int, value: torch.Tensor) -> None:
        """Write tiles ``low:high`` of the bucket into a per-tile tensor of the part."""
        if self.members is not None:
            x.index_copy_(0, self.members[low:high], value.to(x.dtype))
        elif value._base is not x:  # not the slot itself
            x[low:high].copy_(value)


def groups(problem: Problem, kind: Precision, scratch: Scratch, may_stay: bool = False) -> Iterator[Group]:
    """Every batch row's key heads, as many at a time as the budget holds; the buffers of one serve the next.

    With ``may_stay``, keys and values of which a head's copy would be large beside the call itself stay in place.
    """
    q, k, v, layout = problem.q, problem.k, problem.v, problem.layout
    tokens = layout.nk * layout.kv_block
    per_head = tokens * (k.shape[-1] * kind.keys.itemsize + v.shape[-1] * kind.values.itemsize)
    queries = q.shape[1] * problem.ratio * (q.shape[-1] + v.shape[-1]) * q.itemsize
    budget = budget_of(k.device).group
    size = max(1, min(k.shape[2], budget // max(per_head, queries)))
    held = q.shape[0] * k.shape[2] * (queries + layout.kv_len * (k.shape[-1] + v.shape[-1]) * k.itemsize)
    large = problem.on_host and per_head > max(budget, LAID_OUT * held)
    stay = may_stay and large and layout.kv_len >= layout.kv_block

    def blocks(x: torch.Tensor, mask: torch.Tensor | None, dtype: torch.dtype, name: str) -> Table:
        return in_place(x, layout, mask, dtype) if stay else laid_out(x, layout, mask, dtype, name, scratch)

    key_mask = problem.key_mask
    if key_mask is not None and problem.on_host and bool(key_mask.all()):
        key_mask = None
    for b in range(k.shape[0]):
        for g0 in range(0, k.shape[2], size):
            g1 = min(g0 + size, k.shape[2])
            mask = None if key_mask is None else key_mask[b]
            heads = slice(g0 * problem.ratio, g1 * problem.ratio)
            yield Group(
                batch=b,
                g0=g0,
                g1=g1,
                k=blocks(k[b, :, g0:g1], mask, kind.keys, "group k"),
                v=blocks(v[b, :, g0:g1], mask, kind.values, "group v"),
                bias=_bias(problem, b, heads, mask, kind.logits),
                logits=kind.logits,
                low_rank=_low_rank(problem, b, heads, mask, kind.logits, scratch),
            )


def _low_rank(
    problem: Problem, b: int, heads: slice, mask: torch.Tensor | None, dtype: torch.dtype, scratch: Scratch
) -> torch.Tensor | None:
    """(heads|1 * nk, kv_block * R), the keys' side of the low-rank addition; ``None`` when there is none."""
    if problem.low_rank is None:
        return None
    k = problem.low_rank[1]
    k = k[b if k.shape[0] > 1 else 0]
    k = k[heads] if k.shape[0] > 1 else k
    return laid_out(k.transpose(0, 1), problem.layout, mask, dtype, "group rank", scratch).rows


def _bias(
    problem: Problem, b: int, heads: slice, mask: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor | None:
    """(heads|1, nk, kv_block) in base-2 units, ``-inf`` on keys that do not exist; ``None`` when nothing is added."""
    layout, bias = problem.layout, problem.key_bias
    if mask is None and bias is None:
        return None
    if bias is None:
        rows = torch.zeros(1, layout.kv_len, dtype=dtype, device=problem.q.device)
    else:
        rows = bias[b if bias.shape[0] > 1 else 0].to(dtype) * LOG2E
        rows = rows[heads] if bias.shape[1] > 1 else rows
    if mask is not None:
        rows = rows.masked_fill(~mask, NONE)
    return F.pad(rows, (0, layout.nk * layout.kv_block - layout.kv_len), value=NONE).unflatten(1, (layout.nk, -1))


def parts(problem: Problem, group: Group) -> Iterator[Part]:
    """The query tiles of a group: of all its heads at once when there are several, else head by head."""
    layout, ratio = problem.layout, problem.ratio
    full = layout.q_len // layout.q_block
    step = (group.g1 - group.g0) * ratio if group.g1 - group.g0 > 1 else 1
    for h0 in range(group.g0 * ratio, group.g1 * ratio, step):
        heads = slice(h0, h0 + step)
        if full:
            yield _part(problem, group, heads, 0, full, layout.q_block)
        if full < layout.nq:
            yield _part(problem, group, heads, full, layout.nq, layout.q_len - full * layout.q_block)


def _part(problem: Problem, group: Group, heads: slice, first: int, last: int, tokens: int) -> Part:
    layout, ratio = problem.layout, problem.ratio
    local = _of_heads(layout.kv_idx, group.batch, heads)[:, first:last].long()
    count = _of_heads(layout.kv_cnt, group.batch, heads)[:, first:last]
    if not problem.on_host:  # entries past the count are gathered as well: let them repeat the row's first block
        read = torch.arange(local.shape[-1], device=local.device) < count[..., None]
        local = torch.where(read, local, local[..., :1]).clamp(0, layout.nk - 1)
    head = torch.arange(heads.start, heads.stop, device=local.device).view(-1, 1, 1)

    def of_table(table: torch.Tensor | None, table_heads: int) -> torch.Tensor | None:
        """Where the tiles' key blocks stand in a table of all query heads of the group, or of one for all."""
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
    return Part(
        heads=heads,
        rows=rows,
        tokens=tokens,
        idx=(local + (head // ratio - group.g0) * layout.nk).flatten(0, 1),
        count=count.reshape(-1),
        bias_idx=of_table(bias, 0 if bias is None else bias.shape[0]),
        rule=_rule(layout, group.batch, heads, first, local),
        rank_idx=of_table(rank, 0 if rank is None else len(rank) // layout.nk),
        rank_q=rank_q,
    )


def _rule(layout: BlockLayout, batch: int, heads: slice, first: int, columns: torch.Tensor) -> Rule | None:
    """The element mask of query blocks ``first ..`` with key blocks ``columns`` (heads, n, kcap)."""
    if layout.elements is None or layout.n_full is None:
        return None
    n, device = columns.shape[1], columns.device
    return Rule(
        mask=layout.elements,
        batch=batch,
        whole=_of_heads(layout.n_full, batch, heads)[:, first : first + n].reshape(-1),
        heads=torch.arange(heads.start, heads.stop, device=device).repeat_interleave(n),
        rows=torch.arange(first, first + n, device=device).repeat(heads.stop - heads.start),
        columns=columns.flatten(0, 1),
    )


def _of_heads(x: torch.Tensor, b: int, heads: slice) -> torch.Tensor:
    """(heads, ...) of a (B|1, H|1, ...) tensor."""
    x = x[b if x.shape[0] > 1 else 0]
    return x[heads] if x.shape[0] > 1 else x.expand(heads.stop - heads.start, *x.shape[1:])


def buckets(problem: Problem, part: Part) -> Iterator[Bucket]:
    """Tiles that can be computed together. Where counts cannot be read: all of them, as wide as the lists."""
    layout = problem.layout
    missing = layout.nk * layout.kv_block - layout.kv_len
    if not problem.on_host:
        yield _bucket(part, None, part.idx.shape[1], part.idx.shape[1] * layout.kv_block)
        return
    if part.rule is not None:
        yield from _ruled_buckets(layout, part, part.rule)
        return
    kinds = part.count.long() * 2
    if missing:  # the ragged key block is the last one of the lists it is in
        last_read = part.idx.gather(1, (part.count[:, None].long() - 1).clamp(min=0))[:, 0] % layout.nk
        kinds += (last_read == layout.nk - 1) & (part.count > 0)
    ordered, order = kinds.sort(stable=True)
    values, sizes = torch.unique_consecutive(ordered, return_counts=True)
    start = 0
    for value, size in zip(values.tolist(), sizes.tolist()):
        width, ragged = divmod(value, 2)
        if width:
            members = None if size == len(kinds) else order[start : start + size]
            yield _bucket(part, members, width, width * layout.kv_block - ragged * missing)
        start += size


def _ruled_buckets(layout: BlockLayout, part: Part, rule: Rule) -> Iterator[Bucket]:
    """Tiles with equally many entries, sorted by their whole ones: a chunk masks from its first partial one on."""
    order = (part.count.long() * (layout.nk + 1) + rule.whole).argsort(stable=True)
    values, sizes = torch.unique_consecutive(part.count[order], return_counts=True)
    for width, members in zip(values.tolist(), order.split(sizes.tolist())):
        if width:
            yield _bucket(part, members, width, width * layout.kv_block)


def _bucket(part: Part, members: torch.Tensor | None, width: int, keys: int) -> Bucket:
    def rows(idx: torch.Tensor | None) -> torch.Tensor | None:
        if idx is None:
            return None
        return (idx if members is None else idx.index_select(0, members))[:, :width].reshape(-1)

    n = len(part.idx) if members is None else len(members)
    own = rows(part.idx)
    assert own is not None
    return Bucket(members, n, width, keys, own, rows(part.bias_idx), rows(part.rank_idx))


class Work:
    """Buffers for ``n`` tiles of a bucket, in every shape they are needed in, and the steps that fill them."""

    def __init__(self, problem: Problem, group: Group, part: Part, bucket: Bucket, n: int, scratch: Scratch) -> None:
        self.problem, self.group, self.part, self.bucket, self.n = problem, group, part, bucket, n
        self.scratch = scratch
        device, kind, kind_v = problem.q.device, group.k.dtype, group.v.dtype
        wide = group.logits
        dim, dim_v = problem.q.shape[-1], problem.v.shape[-1]
        self.q = scratch.get("q", kind, device, n, part.tokens, dim)
        self.k_blocks = scratch.get("k", kind, device, n * bucket.width, group.k.width)
        self.v_blocks = scratch.get("v", kind_v, device, n * bucket.width, group.v.width)
        self.k = self.k_blocks.view(n, -1, dim)[:, : bucket.keys]
        self.kt = self.k.transpose(1, 2)
        self.v = self.v_blocks.view(n, -1, dim_v)[:, : bucket.keys]
        self.s = scratch.get("s", wide, device, n, part.tokens, bucket.keys)
        self.qk = self.s if kind == wide else scratch.get("qk", kind, device, *self.s.shape)
        spare = self.qk if kind == kind_v else scratch.get("p", kind_v, device, *self.s.shape)
        self.p = self.s if kind_v == wide else spare
        self.o = scratch.get("o", kind_v, device, n, part.tokens, dim_v)
        self.may_be_empty = group.bias is not None or part.rule is not None or not problem.on_host
        self.straight = bucket.members is None

    def logits(self, q: torch.Tensor, low: int, high: int) -> torch.Tensor:
        """(n, tokens, keys) in base-2 units: scale * q k + bias, ``-inf`` where a gathered key is not read.

        Args:
            q: (tiles, tokens, D), all tiles of the part.
            low, high: tiles of the bucket; ``n`` of them.
        """
        bucket = self.bucket
        rows = bucket.of(q, low, high)
        if rows.dtype != self.q.dtype:
            rows = self.q.copy_(rows)
        places = slice(low * bucket.width, high * bucket.width)
        self.group.k.gather(bucket.rows[places], self.k_blocks, self.scratch)
        torch.baddbmm(self.qk, rows, self.kt, beta=0, alpha=self.problem.scale * LOG2E, out=self.qk)
        s = self.s if self.qk is self.s else self.s.copy_(self.qk)
        if self.group.low_rank is not None and self.part.rank_q is not None and bucket.rank_rows is not None:
            left = bucket.of(self.part.rank_q, low, high).to(s.dtype)
            right = self.group.low_rank.index_select(0, bucket.rank_rows[places]).view(self.n, -1, left.shape[-1])
            torch.baddbmm(s, left, right[:, : bucket.keys].transpose(1, 2), alpha=LOG2E, out=s)
        if self.group.bias is not None and bucket.bias_rows is not None:
            bias = self.group.bias.flatten(0, 1).index_select(0, bucket.bias_rows[places])
            s.add_(bias.view(self.n, 1, -1)[..., : bucket.keys])
        if not self.problem.on_host:
            s.masked_fill_(self.unread(low, high), NONE)
        if self.part.rule is not None:
            self._hide(s, self.part.rule, low, high)
        return s

    def _hide(self, s: torch.Tensor, rule: Rule, low: int, high: int) -> None:
        """``-inf`` on pairs that the element mask leaves out; on a host only from the first entry that needs it."""
        layout, bucket, first = self.problem.layout, self.bucket, 0
        everything = torch.arange(low, high, device=s.device)
        tiles = everything if bucket.members is None else bucket.members[low:high]
        if self.problem.on_host:  # the ragged key block may be the last whole entry
            first = max(0, int(rule.whole[tiles].min()) - (layout.kv_len % layout.kv_block != 0))
        if first < bucket.width:
            hidden = rule.hidden(layout, self.part.tokens, tiles, first, bucket.width)
            s[..., first * layout.kv_block :].masked_fill_(hidden, NONE)

    def values(self, low: int, high: int) -> torch.Tensor:
        """(n, keys, Dv), the gathered values."""
        bucket = self.bucket
        places = slice(low * bucket.width, high * bucket.width)
        self.group.v.gather(bucket.rows[places], self.v_blocks, self.scratch)
        return self.v

    def unread(self, low: int, high: int) -> torch.Tensor:
        """(n, 1, keys) bool, True for gathered keys past the row's count or past the sequence."""
        layout = self.problem.layout
        idx, count = self.part.idx[low:high], self.part.count[low:high]
        beyond = torch.arange(idx.shape[1], device=idx.device) >= count[:, None]
        token = idx[..., None] % layout.nk * layout.kv_block + torch.arange(layout.kv_block, device=idx.device)
        return (beyond[..., None] | (token >= layout.kv_len)).flatten(1)[:, None]


def chunks(
    problem: Problem, group: Group, part: Part, bucket: Bucket, scratch: Scratch
) -> Iterator[tuple[Work, int, int]]:
    """The bucket's tiles ``low:high``, as many at a time as fill the budget of all threads together."""
    threads = torch.get_num_threads() if problem.on_host else 1
    gathered = bucket.width * sum(table.width * table.dtype.itemsize for table in (group.k, group.v))
    per_tile = gathered + bucket.keys * part.tokens * group.k.dtype.itemsize
    step = max(1, threads * budget_of(part.idx.device).chunk // per_tile)
    step -= step % threads if step > threads else 0  # every thread gets as many tiles
    work = None
    for low in range(0, bucket.n, step):
        high = min(low + step, bucket.n)
        if work is None or work.n != high - low:
            work = Work(problem, group, part, bucket, high - low, scratch)
        yield work, low, high
