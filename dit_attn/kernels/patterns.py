"""Layouts that follow from the shape of the sequence alone: windows on a grid, bands, sinks, packed sequences.

Every constructor is analytic: it counts, for each query block, the keys of each key block that some of its queries read
and those that all of them read, in closed form. No map of S x S exists, not even block by block of it. Static layouts
are cached by their arguments and device.

``from_flex`` and ``to_flex`` translate from and to FlexAttention's ``BlockMask``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from dit_attn.errors import DitAttnError
from dit_attn.kernels.checks import INTS, check_sizes, dtype_name, is_whole
from dit_attn.kernels.kept import kept
from dit_attn.kernels.layout import BlockLayout, ceil_div, readable
from dit_attn.kernels.masks import BandMask, BitMask, ElementMask, SegmentMask, WindowMask, pack_bits

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


def inward_window(
    grid: tuple[int, ...],
    window: tuple[int, ...] | int,
    *,
    q_block: int = 128,
    kv_block: int = 128,
    text_before: int = 0,
    text_after: int = 0,
    inward: bool = True,
    device: torch.device | str = "cpu",
) -> BlockLayout:
    """Self attention in which every cell of a grid reads its neighbours; at a border the window moves inward.

    Along an axis of N positions with a window of K, position p reads K positions from ``clamp(p - K // 2, 0, N - K)``
    on: neighbourhood attention's border rule (Hassani et al., 2023), FreeSwim's inward window.

    Args:
        grid: positions along 1 to 3 axes, row major, e.g. (T, H, W).
        window: positions read along each axis, or one number for all; an axis shorter than its window is read whole
            (with ``inward=False`` no window may be longer than its axis).
        q_block, kv_block: tokens per block.
        text_before, text_after: tokens before and after the grid that read and are read by everything.
        inward: ``False`` cuts the window at a border instead of moving it.
        device: where the lists shall be.
    """
    axes = tuple(grid) if isinstance(grid, (tuple, list)) else ()
    sizes = tuple(window) if isinstance(window, (tuple, list)) else (window,) * len(axes)
    if not 1 <= len(axes) <= 3 or len(sizes) != len(axes):
        raise DitAttnError(f"a window needs one size for each of 1 to 3 grid axes, got grid {grid} and window {window}")
    if not all(is_whole(n, 1) for n in (*axes, *sizes)) or not all(is_whole(n, 0) for n in (text_before, text_after)):
        raise DitAttnError(
            f"grid {grid} and window {window} must be positive whole numbers, text lengths {text_before} and "
            f"{text_after} whole and not negative"
        )
    check_sizes(q_block=q_block, kv_block=kv_block)
    cut = tuple(min(k, n) for k, n in zip(sizes, axes)) if inward else sizes
    full = (1,) * (3 - len(axes))
    device = torch.device(device)
    return _window((*full, *axes), (*full, *cut), text_before, text_after, inward, q_block, kv_block, device)


@kept
def _window(
    grid: tuple[int, int, int],
    window: tuple[int, int, int],
    before: int,
    after: int,
    inward: bool,
    q_block: int,
    kv_block: int,
    device: torch.device,
) -> BlockLayout:
    seq = before + math.prod(grid) + after
    mask = WindowMask(grid, window, before, before, inward)
    bounds = _bounds(seq, kv_block)
    sizes = bounds.diff()
    text = sizes - (bounds - before).clamp(0, math.prod(grid)).diff()  # tokens outside of the grid, per key block
    block, low, high = _segments(grid, before, seq, q_block)

    def keys_in(touched: bool) -> torch.Tensor:
        counted = _window_counts(mask, low, high, bounds, touched) + text
        return torch.where((low >= 0)[:, None], counted, sizes)  # text reads everything

    some, short = keys_in(True) > 0, keys_in(False) < sizes
    nq = ceil_div(seq, q_block)
    read, short = (torch.zeros(nq, len(sizes)).index_add_(0, block, x.float()) > 0 for x in (some, short))
    return _static(read & ~short, read & short, mask, seq, seq, q_block, kv_block, device)


def _segments(
    grid: tuple[int, int, int], before: int, seq: int, q_block: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query tokens cut at block borders and at ends of grid rows: block, first and last cell; -1 for text."""
    cells, width = math.prod(grid), grid[2]
    cuts = torch.cat(
        [
            torch.arange(0, seq, q_block),
            before + torch.arange(0, cells + 1, width),
            torch.tensor([0, seq]),
        ]
    )
    cuts = cuts[cuts <= seq].unique()
    first, last = cuts[:-1], cuts[1:] - 1
    inside = (first >= before) & (last < before + cells)
    return first // q_block, torch.where(inside, first - before, -1), torch.where(inside, last - before, -1)


def _window_counts(
    mask: WindowMask, low: torch.Tensor, high: torch.Tensor, bounds: torch.Tensor, touched: bool
) -> torch.Tensor:
    """(segments, nk) grid tokens of each key block that some (``touched``) or all cells of a row segment read.

    Within a row the windows of consecutive cells differ along the row only, where they start at most one position
    apart, so both the union and the intersection are boxes.
    """
    depth, height, width = mask.grid
    t, h, w = mask.positions(low.clamp(min=0))
    w_last = mask.positions(high.clamp(min=0))[2]
    box = []
    for axis, (a, b) in enumerate(((t, t), (h, h), (w, w_last))):
        first, last = mask.start(a, axis), mask.start(b, axis)
        begin, end = (first, last + mask.window[axis]) if touched else (last, first + mask.window[axis])
        begin, end = begin.clamp(0, mask.grid[axis]), end.clamp(0, mask.grid[axis])
        box.append((begin[:, None], torch.maximum(begin, end)[:, None]))
    (t0, t1), (h0, h1), (w0, w1) = box
    # Tokens of the box before a bound: whole planes, then whole rows of its plane, then cells of its row.
    cell = (bounds - mask.k_start).clamp(0, depth * height * width)[None]
    bt, bh, bw = cell // (height * width), cell // width % height, cell % width
    rows, cells = h1 - h0, w1 - w0
    in_plane, in_row = (bt >= t0) & (bt < t1), (bh >= h0) & (bh < h1)
    below = (bt.clamp(max=depth) - t0).clamp(min=0).minimum(t1 - t0) * rows * cells
    below = below + in_plane * (bh - h0).clamp(min=0).minimum(rows) * cells
    below = below + (in_plane & in_row) * (bw - w0).clamp(min=0).minimum(cells)
    return below.diff(dim=1)


def band(
    q_len: int,
    kv_len: int,
    before: int,
    after: int,
    *,
    sinks: int = 0,
    q_shift: int = 0,
    q_block: int = 128,
    kv_block: int = 128,
    device: torch.device | str = "cpu",
) -> BlockLayout:
    """Query n reads keys ``n + q_shift - before`` to ``n + q_shift + after``, and the first ``sinks`` keys.

    Args:
        q_len, kv_len: tokens.
        before, after: keys read on either side of the diagonal; ``before=q_len`` and ``after=0`` is causal.
        sinks: keys that every query reads.
        q_shift: place of the first query among the keys.
        q_block, kv_block: tokens per block.
        device: where the lists shall be.
    """
    if not all(is_whole(n, 0) for n in (before, after, sinks)) or not is_whole(q_shift, q_shift):
        raise DitAttnError(
            f"a band needs before, after and sinks of at least 0, got {before}, {after} and {sinks}, and q_shift, got "
            f"{q_shift}, all of them whole numbers"
        )
    check_sizes(q_len=q_len, kv_len=kv_len, q_block=q_block, kv_block=kv_block)
    return _band(q_len, kv_len, before, after, sinks, q_shift, q_block, kv_block, torch.device(device))


def sink_window(seq: int, sinks: int, window: int, **options: Any) -> BlockLayout:
    """The first ``sinks`` keys and a band of ``window`` keys around the diagonal; options as for :func:`band`."""
    return band(seq, seq, window // 2, window - 1 - window // 2, sinks=sinks, **options)


@kept
def _band(
    q_len: int,
    kv_len: int,
    before: int,
    after: int,
    sinks: int,
    q_shift: int,
    q_block: int,
    kv_block: int,
    device: torch.device,
) -> BlockLayout:
    bounds = _bounds(kv_len, kv_block)[None]
    rows = _bounds(q_len, q_block) + q_shift
    first, last = rows[:-1, None], rows[1:, None] - 1

    def keys_in(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        """(nq, nk) keys of each block in the band ``[low, high)`` or among the sinks."""
        low = low.clamp(0, kv_len)
        low, high = low.clamp(min=sinks), torch.maximum(high.clamp(0, kv_len), low.clamp(min=sinks))
        return (bounds.clamp(max=sinks) + (bounds - low).clamp(min=0).minimum(high - low)).diff(dim=1)

    read = keys_in(first - before, last + after + 1) > 0
    whole = keys_in(last - before, first + after + 1) == bounds.diff(dim=1)
    mask = BandMask(before, after, sinks, q_shift)
    return _static(whole, read & ~whole, mask, q_len, kv_len, q_block, kv_block, device)


def from_segments(
    q_ids: torch.Tensor, k_ids: torch.Tensor | None = None, *, q_block: int = 128, kv_block: int = 128
) -> BlockLayout:
    """Packed sequences: a query reads the keys of its own segment. No host synchronisation.

    Args:
        q_ids: (B|1, Sq) ints that fit int32, segment of every query; runs of equal numbers in ascending order keep
            blocks few.
        k_ids: (B|1, Sk) likewise for the keys; ``None`` for the same.
        q_block, kv_block: tokens per block.
    """
    k_ids = q_ids if k_ids is None else k_ids
    if q_ids.ndim != 2 or k_ids.ndim != 2 or q_ids.shape[0] != k_ids.shape[0]:
        raise DitAttnError(
            f"segment numbers must be (B, Sq) and (B, Sk), got {tuple(q_ids.shape)} and {tuple(k_ids.shape)}"
        )
    _check_ints("q_ids", q_ids)
    _check_ints("k_ids", k_ids)
    check_sizes(Sq=q_ids.shape[1], Sk=k_ids.shape[1], q_block=q_block, kv_block=kv_block)
    q_ids, k_ids = q_ids.to(torch.int32).contiguous(), k_ids.to(torch.int32).contiguous()
    (q_low, q_high), (k_low, k_high) = _extremes(q_ids, q_block), _extremes(k_ids, kv_block)
    q_low, q_high, k_low, k_high = q_low[..., None], q_high[..., None], k_low[:, None], k_high[:, None]
    read = (q_low <= k_high) & (k_low <= q_high)
    whole = (q_low == q_high) & (k_low == k_high) & (q_low == k_low)
    sizes = (q_ids.shape[1], k_ids.shape[1], q_block, kv_block)
    return BlockLayout.from_parts(whole[:, None], read[:, None], SegmentMask(q_ids, k_ids), *sizes)


def from_rule(
    rule: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    q_len: int,
    kv_len: int,
    *,
    q_block: int = 128,
    kv_block: int = 128,
    device: torch.device | str = "cpu",
) -> BlockLayout:
    """From any rule, evaluated pair by pair, one query block at a time; its partial blocks are kept as bits.

    Quadratic work, linear memory: for patterns that are made once per shape and kept.

    Args:
        rule: ``rule(n, m)`` says whether queries n (q, 1) read keys m (1, S): bool (q, S); positions as int64.
        q_len, kv_len: tokens.
        q_block, kv_block: tokens per block.
        device: where the lists shall be and the rule is evaluated.
    """
    check_sizes(q_len=q_len, kv_len=kv_len, q_block=q_block, kv_block=kv_block)
    nk, keys = ceil_div(kv_len, kv_block), torch.arange(kv_len, device=device)[None]
    whole, partial, bits = [], [], []
    for low in range(0, q_len, q_block):
        queries = torch.arange(low, min(low + q_block, q_len), device=device)[:, None]
        read = rule(queries, keys)
        if read.dtype != torch.bool or tuple(read.shape) not in ((len(queries), kv_len), (1, kv_len)):
            raise DitAttnError(
                f"rule must return bool ({len(queries)}, {kv_len}) for queries (q, 1) and keys (1, Sk), got "
                f"{dtype_name(read.dtype)} {tuple(read.shape)}"
            )
        read = read.expand(len(queries), -1)
        missing = torch.nn.functional.pad(~read, (0, nk * kv_block - kv_len)).unflatten(1, (nk, kv_block))
        read = torch.nn.functional.pad(read, (0, nk * kv_block - kv_len)).unflatten(1, (nk, kv_block))
        some = read.any(2).any(0)
        full = some & ~missing.any(2).any(0)
        whole.append(full)
        partial.append(some & ~full)
        words = torch.nn.functional.pad(read[:, some & ~full], (0, 0, 0, 0, 0, q_block - len(queries)))
        bits.append(pack_bits(words.transpose(0, 1)))
    entries = max(len(words) for words in bits)
    padded = [torch.nn.functional.pad(words, (0, 0, 0, 0, 0, entries - len(words))) for words in bits]
    mask = BitMask(torch.stack(padded)[None, None])
    sizes = (q_len, kv_len, q_block, kv_block)
    return BlockLayout.from_parts(torch.stack(whole)[None, None], torch.stack(partial)[None, None], mask, *sizes)


def from_lengths(lengths: torch.Tensor, total: int, *, q_block: int = 128, kv_block: int = 128) -> BlockLayout:
    """One packed sequence of several, from their lengths (n,) ints; tokens past their sum read one another.

    Args:
        lengths: (n,) tokens of each part, on the device of the call (``cu_seqlens`` are their cumulated sums).
        total: tokens of the packed sequence.
        q_block, kv_block: tokens per block.
    """
    _check_ints("lengths", lengths)
    if lengths.ndim != 1:
        raise DitAttnError(f"lengths must be (n,), one for each part of the sequence, got {tuple(lengths.shape)}")
    check_sizes(total=total)
    if readable(lengths) and (bool((lengths < 0).any()) or int(lengths.sum()) > total):
        raise DitAttnError(f"lengths must be at least 0 and sum to at most total {total}, got {lengths.tolist()[:8]}")
    ends = lengths.cumsum(0).to(torch.int32)
    ids = torch.searchsorted(ends, torch.arange(total, dtype=torch.int32, device=ends.device), right=True)
    return from_segments(ids[None], q_block=q_block, kv_block=kv_block)


def _check_ints(name: str, x: torch.Tensor) -> None:
    if x.dtype not in INTS:
        raise DitAttnError(f"{name} must hold ints, got {dtype_name(x.dtype)}; cast it")
    if x.dtype == torch.int64 and x.numel() and readable(x):
        low, high, limits = int(x.min()), int(x.max()), torch.iinfo(torch.int32)
        if low < limits.min or high > limits.max:
            raise DitAttnError(f"{name} must fit int32, got {low} to {high}; number the segments anew")


def _extremes(ids: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, n) smallest and largest number of every block."""
    last = ids[:, -1:].expand(-1, -ids.shape[1] % block)
    tiles = torch.cat([ids, last], 1).unflatten(1, (-1, block))
    return tiles.amin(-1), tiles.amax(-1)


# -- FlexAttention -----------------------------------------------------------------------------------------------------


def from_flex(mask: BlockMask) -> BlockLayout:
    """The layout of a FlexAttention ``BlockMask``; its rule is evaluated on the partial blocks, into bits.

    Args:
        mask: made by ``create_block_mask``; its rule may depend on batch row and head.
    """
    if not hasattr(mask, "BLOCK_SIZE"):
        raise DitAttnError(f"mask must be FlexAttention's BlockMask, got {type(mask).__name__}; see create_block_mask")
    q_block, kv_block = mask.BLOCK_SIZE
    q_len, kv_len = mask.seq_lengths
    sizes = (q_len, kv_len, q_block, kv_block)
    nq, nk = ceil_div(q_len, q_block), ceil_div(kv_len, kv_block)
    partial = _blocks_of(mask.kv_num_blocks, mask.kv_indices, nq, nk)
    whole = torch.zeros_like(partial)
    if mask.full_kv_num_blocks is not None and mask.full_kv_indices is not None:
        whole = _blocks_of(mask.full_kv_num_blocks, mask.full_kv_indices, nq, nk)
    if not bool((partial & ~whole).any()):
        return BlockLayout.from_mask(whole, *sizes)
    lists = BlockLayout.from_mask(partial & ~whole, *sizes)
    bits = _bits_of(lists, mask.mask_mod)
    return BlockLayout.from_parts(whole, partial, BitMask(bits), *sizes)


def _blocks_of(count: torch.Tensor, index: torch.Tensor, nq: int, nk: int) -> torch.Tensor:
    """(B, H, nq, nk) bool from FlexAttention's lists."""
    read = torch.zeros(*index.shape[:3], nk + 1, dtype=torch.bool, device=index.device)
    listed = torch.arange(index.shape[-1], device=index.device) < count[..., None]
    return read.scatter(-1, torch.where(listed, index.long(), nk), True)[:, :, :nq, :nk]


def _bits_of(lists: BlockLayout, rule: Callable[..., torch.Tensor]) -> torch.Tensor:
    """(B, H, nq, entries, q_block, words) int32 of a rule on the blocks of ``lists``."""
    idx = lists.kv_idx
    q = torch.arange(lists.q_block, device=idx.device)
    k = torch.arange(lists.kv_block, device=idx.device)
    bits = torch.zeros(*idx.shape, lists.q_block, ceil_div(lists.kv_block, 32), dtype=torch.int32, device=idx.device)
    for b, h, row in torch.cartesian_prod(*(torch.arange(n) for n in idx.shape[:3])).tolist():
        queries = (row * lists.q_block + q)[None, :, None].clamp(max=lists.q_len - 1)
        keys = (idx[b, h, row].long()[:, None] * lists.kv_block + k)[:, None, :]
        batch, head = (torch.tensor(n, device=idx.device) for n in (b, h))
        read = rule(batch, head, queries, keys.clamp(max=lists.kv_len - 1))
        bits[b, h, row] = pack_bits(read.expand(-1, lists.q_block, lists.kv_block))
    return bits


def to_flex(layout: BlockLayout) -> BlockMask:
    """The FlexAttention ``BlockMask`` that reads the same pairs.

    Raises:
        DitAttnError: block sizes FlexAttention cannot express: they must divide 128 or be multiples of it.
    """
    from torch.nn.attention.flex_attention import BlockMask

    full, read = layout.full_mask(), layout.block_mask()
    ragged = read.new_zeros(layout.nk)
    ragged[-1] = layout.kv_len % layout.kv_block != 0
    partial = read & (~full | ragged)  # FlexAttention must be told where a sequence ends
    count, index = _listed(partial)
    full_count, full_index = _listed(full & ~ragged)
    return BlockMask.from_kv_blocks(
        count, index, full_count, full_index, (layout.q_block, layout.kv_block), _rule_of(layout, full, read),
        seq_lengths=(layout.q_len, layout.kv_len),
    )  # fmt: skip


def _listed(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(.., nq) counts and (.., nq, nk) indices, chosen blocks first."""
    order = torch.argsort(mask.to(torch.int8), dim=-1, descending=True, stable=True)
    return mask.sum(-1).to(torch.int32), order.to(torch.int32)


def _rule_of(layout: BlockLayout, whole: torch.Tensor, read: torch.Tensor) -> Callable[..., torch.Tensor]:
    """Which pairs are read; complete, because FlexAttention without a compiler looks at nothing else."""
    elements, q_len, kv_len = layout.elements, layout.q_len, layout.kv_len
    entries = ((read & ~whole).cumsum(-1) - 1).clamp(min=0)  # of a row's partial blocks, which one it is

    def of(x: torch.Tensor, b: torch.Tensor, h: torch.Tensor) -> tuple[Any, Any]:
        """Batch row and head of a (B|1, H|1, ...) tensor."""
        return b if x.shape[0] > 1 else 0, h if x.shape[1] > 1 else 0

    def rule(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        inside = (q < q_len) & (k < kv_len)
        block = (*of(read, b, h), q // layout.q_block, k // layout.kv_block)
        if elements is None:
            return inside & read[block]
        if isinstance(elements, SegmentMask):
            row = b if elements.q_ids.shape[0] > 1 else 0
            allowed = elements.q_ids[row, q] == elements.k_ids[row, k]
        elif isinstance(elements, BitMask):
            key = k % layout.kv_block
            place = (*of(elements.bits, b, h), block[2], entries[block], q % layout.q_block, key // 32)
            allowed = ((elements.bits[place] >> (key % 32)) & 1) != 0
        else:
            allowed = elements.allowed(q, k)
        return inside & (whole[block] | (read[block] & allowed))

    return rule


# -- shared ------------------------------------------------------------------------------------------------------------


def _bounds(seq: int, block: int) -> torch.Tensor:
    """(n + 1,) int64, where blocks begin and where the sequence ends."""
    return torch.cat([torch.arange(0, seq, block), torch.tensor([seq])])


def _static(
    whole: torch.Tensor,
    partial: torch.Tensor,
    mask: ElementMask,
    q_len: int,
    kv_len: int,
    q_block: int,
    kv_block: int,
    device: torch.device,
) -> BlockLayout:
    """The layout of (nq, nk) block masks."""
    layout = BlockLayout.from_parts(whole[None, None], partial[None, None], mask, q_len, kv_len, q_block, kv_block)
    return layout.to(device)
