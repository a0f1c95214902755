"""Conversion from and to FlexAttention's ``BlockMask``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from dit_attn.errors import DitAttnError
from dit_attn.kernels.layouts.block_layout import BlockLayout, ceil_div
from dit_attn.kernels.layouts.element_masks import BitMask, SegmentMask, pack_bits

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


def from_flex(mask: BlockMask) -> BlockLayout:
    """Convert a FlexAttention ``BlockMask`` to a layout; its rule is evaluated on the partial blocks, into bits.

    Args:
        mask: from ``create_block_mask``; its rule may depend on batch row and head.

    Raises:
        DitAttnError: ``mask`` is no ``BlockMask``.
    """
    if not hasattr(mask, "BLOCK_SIZE"):
        raise DitAttnError(f"mask must be FlexAttention's BlockMask, got {type(mask).__name__}; see create_block_mask")
    q_block, kv_block = mask.BLOCK_SIZE
    q_len, kv_len = mask.seq_lengths
    sizes = (q_len, kv_len, q_block, kv_block)
    nq, nk = ceil_div(q_len, q_block), ceil_div(kv_len, kv_block)
    partial = _blocks_of(mask.kv_num_blocks, mask.kv_indices, nq, nk)
    full = torch.zeros_like(partial)
    if mask.full_kv_num_blocks is not None and mask.full_kv_indices is not None:
        full = _blocks_of(mask.full_kv_num_blocks, mask.full_kv_indices, nq, nk)
    if not bool((partial & ~full).any()):
        return BlockLayout.from_mask(full, *sizes)
    lists = BlockLayout.from_mask(partial & ~full, *sizes)
    bits = _bits_of(lists, mask.mask_mod)
    return BlockLayout.from_parts(full, partial, BitMask(bits), *sizes)


def _blocks_of(count: torch.Tensor, index: torch.Tensor, nq: int, nk: int) -> torch.Tensor:
    """(B, H, nq, nk) bool from FlexAttention's lists."""
    attended = torch.zeros(*index.shape[:3], nk + 1, dtype=torch.bool, device=index.device)
    listed = torch.arange(index.shape[-1], device=index.device) < count[..., None]
    return attended.scatter(-1, torch.where(listed, index.long(), nk), True)[:, :, :nq, :nk]


def _bits_of(lists: BlockLayout, rule: Callable[..., torch.Tensor]) -> torch.Tensor:
    """(B, H, nq, entries, q_block, words) int32 of a rule on the blocks of ``lists``."""
    idx = lists.kv_indices
    q = torch.arange(lists.q_block, device=idx.device)
    k = torch.arange(lists.kv_block, device=idx.device)
    bits = torch.zeros(*idx.shape, lists.q_block, ceil_div(lists.kv_block, 32), dtype=torch.int32, device=idx.device)
    for b, h, row in torch.cartesian_prod(*(torch.arange(n) for n in idx.shape[:3])).tolist():
        queries = (row * lists.q_block + q)[None, :, None].clamp(max=lists.q_len - 1)
        keys = (idx[b, h, row].long()[:, None] * lists.kv_block + k)[:, None, :]
        batch, head = (torch.tensor(n, device=idx.device) for n in (b, h))
        attended = rule(batch, head, queries, keys.clamp(max=lists.kv_len - 1))
        bits[b, h, row] = pack_bits(attended.expand(-1, lists.q_block, lists.kv_block))
    return bits


def to_flex(layout: BlockLayout) -> BlockMask:
    """Convert a layout to the FlexAttention ``BlockMask`` with the same pairs.

    Compiled FlexAttention needs block sizes that divide 128 or are multiples of it.
    """
    from torch.nn.attention.flex_attention import BlockMask

    full, attended = layout.full_mask(), layout.block_mask()
    ragged = attended.new_zeros(layout.nk)
    ragged[-1] = layout.kv_len % layout.kv_block != 0
    partial = attended & (~full | ragged)  # FlexAttention masks the end of a sequence by the rule
    count, index = _listed(partial)
    full_count, full_index = _listed(full & ~ragged)
    return BlockMask.from_kv_blocks(
        count, index, full_count, full_index, (layout.q_block, layout.kv_block), _rule_of(layout, full, attended),
        seq_lengths=(layout.q_len, layout.kv_len),
    )  # fmt: skip


def _listed(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(..., nq) counts and (..., nq, nk) indices, chosen blocks first."""
    order = torch.argsort(mask.to(torch.int8), dim=-1, descending=True, stable=True)
    return mask.sum(-1).to(torch.int32), order.to(torch.int32)


def _rule_of(layout: BlockLayout, full: torch.Tensor, attended: torch.Tensor) -> Callable[..., torch.Tensor]:
    """The rule of all pairs, complete: without a compiler, FlexAttention evaluates nothing else."""
    elements, q_len, kv_len = layout.elements, layout.q_len, layout.kv_len
    entries = ((attended & ~full).cumsum(-1) - 1).clamp(min=0)  # of a row's partial blocks, which one it is

    def of(x: torch.Tensor, b: torch.Tensor, h: torch.Tensor) -> tuple[Any, Any]:
        """Batch row and head of a (B|1, H|1, ...) tensor."""
        return b if x.shape[0] > 1 else 0, h if x.shape[1] > 1 else 0

    def rule(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        inside = (q < q_len) & (k < kv_len)
        block = (*of(attended, b, h), q // layout.q_block, k // layout.kv_block)
        if elements is None:
            return inside & attended[block]
        if isinstance(elements, SegmentMask):
            row = b if elements.q_ids.shape[0] > 1 else 0
            allowed = elements.q_ids[row, q] == elements.k_ids[row, k]
        elif isinstance(elements, BitMask):
            key = k % layout.kv_block
            place = (*of(elements.bits, b, h), block[2], entries[block], q % layout.q_block, key // 32)
            allowed = ((elements.bits[place] >> (key % 32)) & 1) != 0
        else:
            allowed = elements.allowed(q, k)
        return inside & (full[block] | (attended[block] & allowed))

    return rule
