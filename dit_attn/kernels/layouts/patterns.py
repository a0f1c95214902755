"""Static layouts, which follow from the lengths alone: bands, sinks, packed sequences; windows are in ``windows.py``.

Constructors are analytic: they count in closed form, for each query block, the keys of each key block that some of its
queries attend to and those that all of them do. Nothing of size S x S is built. Results are cached by arguments and
device where they depend on nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dit_attn.errors import DitAttnError
from dit_attn.kernels.checks import INTS, check_sizes, dtype_name, is_whole
from dit_attn.kernels.device import host_readable
from dit_attn.kernels.layouts.block_layout import BlockLayout, ceil_div
from dit_attn.kernels.layouts.cache import cached
from dit_attn.kernels.layouts.element_masks import BandMask, BitMask, ElementMask, SegmentMask, pack_bits


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
    """Build a banded layout with sink keys.

    Query n attends to keys ``n + q_shift - before`` to ``n + q_shift + after``, and to the first ``sinks`` keys.

    Args:
        q_len, kv_len: tokens.
        before, after: keys on either side of the diagonal; ``before=q_len`` and ``after=0`` is causal.
        sinks: number of keys, from the first, that every query attends to.
        q_shift: position of the first query among the keys.
        q_block, kv_block: tokens per block.
        device: where the lists are.

    Raises:
        DitAttnError: a size that is not a whole number, or out of range.
    """
    if not all(is_whole(n, 0) for n in (before, after, sinks)) or not is_whole(q_shift, q_shift):
        raise DitAttnError(
            f"a band needs before, after and sinks of at least 0, got {before}, {after} and {sinks}, and q_shift, got "
            f"{q_shift}, all of them whole numbers"
        )
    check_sizes(q_len=q_len, kv_len=kv_len, q_block=q_block, kv_block=kv_block)
    return _band(q_len, kv_len, before, after, sinks, q_shift, q_block, kv_block, torch.device(device))


def sink_window(seq: int, sinks: int, window: int, **options: Any) -> BlockLayout:
    """Build the layout of a sliding window of ``window`` keys with ``sinks`` sink keys; options as for :func:`band`."""
    return band(seq, seq, window // 2, window - 1 - window // 2, sinks=sinks, **options)


@cached
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

    attended = keys_in(first - before, last + after + 1) > 0
    full = keys_in(last - before, first + after + 1) == bounds.diff(dim=1)
    mask = BandMask(before, after, sinks, q_shift)
    return _static(full, attended & ~full, mask, q_len, kv_len, q_block, kv_block, device)


def from_segments(
    q_ids: torch.Tensor, k_ids: torch.Tensor | None = None, *, q_block: int = 128, kv_block: int = 128
) -> BlockLayout:
    """Build the layout of packed sequences: a query attends to the keys of its own segment. No host synchronisation.

    Args:
        q_ids: (B|1, Sq) ints that fit int32, segment of every query; in ascending order the fewest blocks are needed.
        k_ids: (B|1, Sk) likewise for the keys; ``None`` for the same.
        q_block, kv_block: tokens per block.

    Raises:
        DitAttnError: other shapes or dtypes, or a number that does not fit int32.
    """
    k_ids = q_ids if k_ids is None else k_ids
    if q_ids.ndim != 2 or k_ids.ndim != 2 or q_ids.shape[0] != k_ids.shape[0]:
        raise DitAttnError(
            f"segment numbers must be (B, Sq) and (B, Sk), got {tuple(q_ids.shape)} and {tuple(k_ids.shape)}"
        )
    _check_ints("q_ids", q_ids)
    _check_ints("k_ids", k_ids)
    check_sizes(Sq=q_ids.shape[1], Sk=k_ids.shape[1], q_block=q_block, kv_block=kv_block)
    return _segment_layout(q_ids.to(torch.int32).contiguous(), k_ids.to(torch.int32).contiguous(), q_block, kv_block)


def _segment_layout(q_ids: torch.Tensor, k_ids: torch.Tensor, q_block: int, kv_block: int) -> BlockLayout:
    (q_low, q_high), (k_low, k_high) = _extremes(q_ids, q_block), _extremes(k_ids, kv_block)
    q_low, q_high, k_low, k_high = q_low[..., None], q_high[..., None], k_low[:, None], k_high[:, None]
    attended = (q_low <= k_high) & (k_low <= q_high)
    full = (q_low == q_high) & (k_low == k_high) & (q_low == k_low)
    sizes = (q_ids.shape[1], k_ids.shape[1], q_block, kv_block)
    return BlockLayout.from_parts(full[:, None], attended[:, None], SegmentMask(q_ids, k_ids), *sizes)


def from_rule(
    rule: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    q_len: int,
    kv_len: int,
    *,
    q_block: int = 128,
    kv_block: int = 128,
    device: torch.device | str = "cpu",
) -> BlockLayout:
    """Build a layout from any rule, evaluated for one query block at a time; partial blocks are stored as bits.

    Quadratic work, linear memory: for patterns that are built once per shape and cached.

    Args:
        rule: ``rule(n, m)`` returns bool (q, S), whether queries n (q, 1) attend to keys m (1, S); positions are int64.
        q_len, kv_len: tokens.
        q_block, kv_block: tokens per block.
        device: where the lists are, and where the rule is evaluated.

    Raises:
        DitAttnError: a size below 1, or a rule that returns another dtype or shape.
    """
    check_sizes(q_len=q_len, kv_len=kv_len, q_block=q_block, kv_block=kv_block)
    nk, keys = ceil_div(kv_len, kv_block), torch.arange(kv_len, device=device)[None]
    full, partial, bits = [], [], []
    for low in range(0, q_len, q_block):
        queries = torch.arange(low, min(low + q_block, q_len), device=device)[:, None]
        attended = rule(queries, keys)
        if attended.dtype != torch.bool or tuple(attended.shape) not in ((len(queries), kv_len), (1, kv_len)):
            raise DitAttnError(
                f"rule must return bool ({len(queries)}, {kv_len}) for queries (q, 1) and keys (1, Sk), got "
                f"{dtype_name(attended.dtype)} {tuple(attended.shape)}; compare positions"
            )
        attended = attended.expand(len(queries), -1)
        missing = torch.nn.functional.pad(~attended, (0, nk * kv_block - kv_len)).unflatten(1, (nk, kv_block))
        attended = torch.nn.functional.pad(attended, (0, nk * kv_block - kv_len)).unflatten(1, (nk, kv_block))
        some = attended.any(2).any(0)
        is_full = some & ~missing.any(2).any(0)
        full.append(is_full)
        partial.append(some & ~is_full)
        words = torch.nn.functional.pad(attended[:, some & ~is_full], (0, 0, 0, 0, 0, q_block - len(queries)))
        bits.append(pack_bits(words.transpose(0, 1)))
    entries = max(len(words) for words in bits)
    padded = [torch.nn.functional.pad(words, (0, 0, 0, 0, 0, entries - len(words))) for words in bits]
    mask = BitMask(torch.stack(padded)[None, None])
    sizes = (q_len, kv_len, q_block, kv_block)
    return BlockLayout.from_parts(torch.stack(full)[None, None], torch.stack(partial)[None, None], mask, *sizes)


def from_lengths(lengths: torch.Tensor, total: int, *, q_block: int = 128, kv_block: int = 128) -> BlockLayout:
    """Build the layout of packed sequences from their lengths; tokens past their sum form one more sequence.

    Args:
        lengths: (n,) ints, tokens of each sequence, on the device of the call (``cu_seqlens`` is their cumulative sum).
        total: tokens of the packed sequence.
        q_block, kv_block: tokens per block.

    Raises:
        DitAttnError: lengths that are negative, exceed ``total``, or are not (n,) ints.
    """
    _check_ints("lengths", lengths)
    if lengths.ndim != 1:
        raise DitAttnError(f"lengths must be (n,), one per packed sequence, got {tuple(lengths.shape)}")
    check_sizes(total=total, q_block=q_block, kv_block=kv_block)
    if host_readable(lengths) and (bool((lengths < 0).any()) or int(lengths.sum()) > total):
        raise DitAttnError(f"lengths must be at least 0 and sum to at most total {total}, got {lengths.tolist()[:8]}")
    ends = lengths.cumsum(0).to(torch.int32)
    ids = torch.searchsorted(ends, torch.arange(total, dtype=torch.int32, device=ends.device), right=True)
    ids = ids[None].to(torch.int32)
    return _segment_layout(ids, ids, q_block, kv_block)


def _check_ints(name: str, x: torch.Tensor) -> None:
    if x.dtype not in INTS:
        raise DitAttnError(f"{name} must be of an integer dtype, got {dtype_name(x.dtype)}; cast it")
    if x.dtype == torch.int64 and x.numel() and host_readable(x):
        low, high, limits = int(x.min()), int(x.max()), torch.iinfo(torch.int32)
        if low < limits.min or high > limits.max:
            raise DitAttnError(f"{name} must fit int32, got {low} to {high}; renumber the segments")


def _extremes(ids: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, n), smallest and largest number of every block."""
    last = ids[:, -1:].expand(-1, -ids.shape[1] % block)
    tiles = torch.cat([ids, last], 1).unflatten(1, (-1, block))
    return tiles.amin(-1), tiles.amax(-1)


# -- shared ------------------------------------------------------------------------------------------------------------


def _bounds(seq: int, block: int) -> torch.Tensor:
    """(n + 1,) int64, the first token of every block and the end of the sequence."""
    return torch.cat([torch.arange(0, seq, block), torch.tensor([seq])])


def _static(
    full: torch.Tensor,
    partial: torch.Tensor,
    mask: ElementMask,
    q_len: int,
    kv_len: int,
    q_block: int,
    kv_block: int,
    device: torch.device,
) -> BlockLayout:
    """The layout of (nq, nk) block masks, on a device."""
    layout = BlockLayout.from_parts(full[None, None], partial[None, None], mask, q_len, kv_len, q_block, kv_block)
    return layout.to(device)
