"""Block lists: which key blocks of a row are chosen by score, lists from block masks, and lists of the other direction.

By score, a block of ``-inf`` is never chosen; of equal scores the lower index wins; forced blocks come first and count
towards the budget. Arguments are trusted: :class:`~dit_attn.kernels.BlockLayout` and the selection check them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dit_attn.kernels.device import host_readable
from dit_attn.kernels.layouts.element_masks import BitMask, ElementMask

Chosen = tuple[torch.Tensor, torch.Tensor]
"""Block numbers (..., nq, m) int64 in any order, ``nk`` where there is none, and the count of each row (..., nq)."""


def top_k_blocks(scores: torch.Tensor, k: int | torch.Tensor, forced: torch.Tensor | None) -> Chosen:
    """Choose the ``k`` best blocks of every row.

    Args:
        scores: (B, H, nq, nk).
        k: blocks per row, clamped to [1, nk]; an int64 tensor, 0-d or (B|1, H|1, 1), makes the result nk wide.
        forced: bool, expands to the shape of ``scores``; a row with more than ``k`` gets all of them and no other.
    """
    nk = scores.shape[-1]
    width = nk if forced is not None or isinstance(k, torch.Tensor) else max(1, min(k, nk))
    least = k.to(scores.device).clamp(1, nk) if isinstance(k, torch.Tensor) else max(1, min(k, nk))
    order, fixed, available = _ranked(scores, forced)
    count = available.clamp(max=least) if fixed is None else torch.minimum(fixed.clamp(min=least), available)
    return _first(order, count, nk)[..., :width], count


def top_p_blocks(
    scores: torch.Tensor, p: float | torch.Tensor, k_min: int | torch.Tensor, forced: torch.Tensor | None
) -> Chosen:
    """Choose the fewest blocks of every row whose softmax mass reaches ``p``.

    Args:
        scores: (B, H, nq, nk) logits.
        p: mass in (0, 1], or a tensor of it, 0-d or (B|1, H|1, 1); 1 chooses every block.
        k_min: smallest number of blocks per row, an int or (B|1, H|1, 1).
        forced: bool, expands to the shape of ``scores``; the mass of these blocks counts first.
    """
    order, fixed, available = _ranked(scores, forced)
    mass = torch.softmax(scores.float(), -1).gather(-1, order)
    few = k_min.to(scores.device).clamp(min=1) if isinstance(k_min, torch.Tensor) else max(1, k_min)
    least = (torch.zeros_like(available) if fixed is None else fixed).clamp(min=few)
    # A block is needed while the mass before it is short of p; the sum may round, so p = 1 is a case of its own.
    needed = available
    if isinstance(p, torch.Tensor):
        p = p.to(scores.device)
        needed = torch.where(p < 1.0, (mass.cumsum(-1) - mass < p[..., None]).sum(-1), available)
    elif p < 1.0:
        needed = (mass.cumsum(-1) - mass < p).sum(-1)
    count = torch.minimum(torch.maximum(needed, least), available)
    return _first(order, count, scores.shape[-1]), count


def _first(order: torch.Tensor, count: torch.Tensor, nk: int) -> torch.Tensor:
    """The first ``count`` of each row of ``order``, the others replaced by ``nk``."""
    return torch.where(torch.arange(nk, device=order.device) < count[..., None], order, nk)


def _ranked(
    scores: torch.Tensor, forced: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Block numbers from best to worst, forced ones first, ties by index; forced and selectable blocks per row."""
    selectable = scores != float("-inf")
    fixed = None
    if forced is not None:
        forced = forced.expand_as(scores)
        selectable, fixed = selectable | forced, forced.sum(-1)
        scores = scores.masked_fill(forced, float("inf"))
    return torch.sort(scores, dim=-1, descending=True, stable=True).indices, fixed, selectable.sum(-1)


def full_then_partial(full: torch.Tensor, partial: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """List the blocks of each row of two disjoint (..., rows, n) bool masks: the full ones, then the partial ones.

    Returns:
        (..., rows, width) int32, each part ascending; (..., rows) int32 counts of both; (..., rows) int32 of full ones.
    """
    n = full.shape[-1]
    place = torch.arange(n, device=full.device, dtype=torch.int32)
    order = torch.where(full, place, torch.where(partial, place + n, 2 * n)).sort(-1).values
    full_count = full.sum(-1)
    count = full_count + partial.sum(-1)
    if host_readable(count):
        order = order[..., : max(int(count.max()), 1)]
    idx = torch.where(order < 2 * n, order % n, 0).to(torch.int32).contiguous()
    return idx, count.to(torch.int32), full_count.to(torch.int32)


@dataclass(frozen=True)
class ReverseLists:
    """The lists in the other direction: which query blocks attend to each key block. The backward pass uses them.

    Attributes:
        q_indices: (B|1, H|1, nk, qcap) int32, the query blocks that attend to all of the key block, ascending, then
            those that attend to a part of it, ascending.
        q_num_blocks: (B|1, H|1, nk) int32, entries of each list.
        full_q_num_blocks: (B|1, H|1, nk) int32, how many of them attend to all of it; ``None`` when all do.
        entry: (B|1, H|1, nk, qcap) int32, which of the query block's partial entries the key block is; with bits only.
    """

    q_indices: torch.Tensor
    q_num_blocks: torch.Tensor
    full_q_num_blocks: torch.Tensor | None
    entry: torch.Tensor | None = None


def reverse_lists(attended: torch.Tensor, full: torch.Tensor, elements: ElementMask | None) -> ReverseLists:
    """Build the lists of the other direction.

    Args:
        attended, full: (B|1, H|1, nq, nk) bool, blocks that are attended to, and those of them that are full.
        elements: the rule of the others, or ``None`` when there are none.
    """
    attended, full = attended.transpose(-1, -2), full.transpose(-1, -2)
    partial = attended & ~full
    indices, count, full_count = full_then_partial(full, partial)
    if elements is None:
        return ReverseLists(indices, count, None)
    entry = None
    if isinstance(elements, BitMask):
        entry = (partial.cumsum(-2, dtype=torch.int32) - 1).clamp(min=0).gather(-1, indices.long())
    return ReverseLists(indices, count, full_count, entry)
