"""Selection of key blocks by pooled queries and keys.

The mean of its queries represents a query block, the mean of its keys a key block; their product estimates the block's
logits. Memory is linear in the sequence but for the (nq, nk) block scores.

Methods call :func:`plan_blocks`, or :func:`plan_scores` with scores of their own. Plain torch runs, which is also the
reference, or on an NVIDIA GPU with Triton the fused kernels of ``triton_select``, which choose the same blocks without
the scores, the sort and the temporaries. Public functions check their arguments; what they call trusts them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from dit_attn.errors import DitAttnError
from dit_attn.kernels.checks import check_blocks, check_choices, check_heads, check_key_mask, check_sizes, check_tokens
from dit_attn.kernels.device import full_precision
from dit_attn.kernels.layouts.block_layout import BlockLayout, ceil_div, selected_bits
from dit_attn.kernels.layouts.block_lists import top_k_blocks, top_p_blocks
from dit_attn.kernels.selection.budget import Budget, check_budget, resolve_budget
from dit_attn.kernels.selection.dispatch import uses_triton
from dit_attn.kernels.selection.pooling import block_counts, block_means


class BlockPlan(NamedTuple):
    """The result of a selection.

    Attributes:
        layout: the chosen key blocks of every query block.
        selected_mass: (B, H, nq) fp32, fraction of the pooled softmax mass in the chosen blocks; with ``stats``.
        bits: (B, H, nq, ceil(nk / 32)) int32, bit ``j % 32`` of word ``j // 32`` set where block j is chosen; with
            ``stats``.
    """

    layout: BlockLayout
    selected_mass: torch.Tensor | None = None
    bits: torch.Tensor | None = None


# -- plans -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def plan_blocks(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    q_block: int,
    kv_block: int,
    density: Budget | None = None,
    top_p: Budget | None = None,
    k_min: int | Sequence[int] = 1,
    forced: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    scale: float | None = None,
    stats: bool = False,
    backend: str | None = None,
) -> BlockPlan:
    """Choose the key blocks of every query block from pooled queries and keys. Not differentiable.

    The same blocks as :func:`block_scores` followed by :func:`select_blocks`.

    Args:
        q: (B, S, H, D).
        k: (B, Sk, Hk, D); ``H % Hk == 0``.
        q_block, kv_block: tokens per block.
        density: fraction of key blocks per query block, for all query heads or one for each (see ``Budget``);
            ``ceil(density * nk)`` are chosen, forced ones included. The lists are as wide as those of the head with
            most blocks. The values of a tensor on the device of q may change between calls of one compiled graph; the
            lists are then as wide as a dense row.
        top_p: alternatively, the softmax mass to reach; likewise.
        k_min: with ``top_p``, the smallest number of blocks per row, for all query heads or one for each.
        forced: (B|1, H|1, nq|1, nk|1) bool, blocks that are always chosen.
        key_mask: (B, Sk) bool, keys that exist.
        scale: softmax scale, default ``D ** -0.5``.
        stats: also return the selected mass and the bits.
        backend: ``"triton"`` or ``"torch"`` to force it; ``None`` picks (see ``unsupported_reason_fused``).

    Raises:
        DitAttnError: the budget, the heads, a mask or the forced backend does not fit.
    """
    check_pair(q, k, q_block, kv_block, key_mask)
    check_budget(density, top_p, k_min, q.shape[0], q.shape[2])
    check_choices((q.shape[0], q.shape[2], ceil_div(q.shape[1], q_block), ceil_div(k.shape[1], kv_block)), forced)
    if uses_triton(backend, q, ceil_div(k.shape[1], kv_block), q.shape[-1]):
        from dit_attn.kernels.selection.triton_select import fused_select

        return BlockPlan(
            *fused_select(
                q, k, q_block=q_block, kv_block=kv_block, density=density, top_p=top_p, k_min=k_min, forced=forced,
                key_mask=key_mask, scale=scale, stats=stats,
            )
        )  # fmt: skip
    scores = _scores(q, k, q_block, kv_block, scale, key_mask)
    return _plan(scores, (density, top_p, k_min), forced, (q.shape[1], k.shape[1], q_block, kv_block), stats)


@torch.no_grad()
def plan_scores(
    scores: torch.Tensor,
    *,
    density: Budget | None = None,
    top_p: Budget | None = None,
    k_min: int | Sequence[int] = 1,
    forced: torch.Tensor | None = None,
    q_len: int,
    kv_len: int,
    q_block: int,
    kv_block: int,
    stats: bool = False,
    backend: str | None = None,
) -> BlockPlan:
    """Choose the key blocks of every query block by given scores. Not differentiable.

    Args:
        scores: (B, H, nq, nk) logits, such as those of :func:`block_scores`; a block of ``-inf`` is never chosen.
        density, top_p, k_min, forced, stats, backend: as for :func:`plan_blocks`.
        q_len, kv_len: tokens.
        q_block, kv_block: tokens per block.

    Raises:
        DitAttnError: the budget, the scores, ``forced`` or the forced backend does not fit.
    """
    check_blocks("scores", scores, q_len, kv_len, q_block, kv_block)
    check_budget(density, top_p, k_min, scores.shape[0], scores.shape[1])
    check_choices(tuple(scores.shape), forced)
    if uses_triton(backend, scores, scores.shape[-1]):
        from dit_attn.kernels.selection.triton_select import fused_select_scores

        return BlockPlan(
            *fused_select_scores(
                scores, density=density, top_p=top_p, k_min=k_min, forced=forced, q_len=q_len, kv_len=kv_len,
                q_block=q_block, kv_block=kv_block, stats=stats,
            )
        )  # fmt: skip
    return _plan(scores, (density, top_p, k_min), forced, (q_len, kv_len, q_block, kv_block), stats)


# -- scores and choice, step by step -----------------------------------------------------------------------------------


def block_scores(
    q: torch.Tensor,
    k: torch.Tensor,
    q_block: int,
    kv_block: int,
    scale: float | None = None,
    key_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Estimate the logit of every (query block, key block) pair from their means.

    The logarithm of the number of valid keys is added, so that a softmax over the row gives a ragged block its proper
    weight; a block without a valid key gets ``-inf`` and is never chosen.

    Args:
        q: (B, S, H, D).
        k: (B, Sk, Hk, D); ``H % Hk == 0``.
        q_block, kv_block: tokens per block.
        scale: softmax scale, default ``D ** -0.5``.
        key_mask: (B, Sk) bool, keys that exist.

    Returns:
        (B, H, nq, nk) fp32.

    Raises:
        DitAttnError: q, k, a block size or the mask does not fit; the message gives the remedy.
    """
    check_pair(q, k, q_block, kv_block, key_mask)
    return _scores(q, k, q_block, kv_block, scale, key_mask)


def select_blocks(
    scores: torch.Tensor,
    *,
    density: Budget | None = None,
    top_p: Budget | None = None,
    k_min: int | Sequence[int] = 1,
    forced: torch.Tensor | None = None,
    q_len: int,
    kv_len: int,
    q_block: int,
    kv_block: int,
) -> BlockLayout:
    """Choose the key blocks of every query block by given scores, as a layout.

    Args:
        scores: (B, H, nq, nk) fp32 logits, such as those of :func:`block_scores`.
        density: fraction of key blocks per query block, for all heads or one for each (see ``Budget``);
            ``ceil(density * nk)`` are chosen, forced ones included.
        top_p: alternatively, the softmax mass to reach; likewise.
        k_min: with ``top_p``, the smallest number of blocks per row, for all heads or one for each.
        forced: bool, expands to the shape of ``scores``: blocks that are always chosen.
        q_len, kv_len: tokens.
        q_block, kv_block: tokens per block.

    Raises:
        DitAttnError: both or neither of density and top_p are given, one is out of (0, 1], or a shape does not fit.
    """
    check_blocks("scores", scores, q_len, kv_len, q_block, kv_block)
    check_budget(density, top_p, k_min, scores.shape[0], scores.shape[1])
    check_choices(tuple(scores.shape), forced)
    return _layout(scores, (density, top_p, k_min), forced, (q_len, kv_len, q_block, kv_block))


def check_pair(q: torch.Tensor, k: torch.Tensor, q_block: int, kv_block: int, key_mask: torch.Tensor | None) -> None:
    """Check that q (B, S, H, D), k (B, Sk, Hk, D), the block sizes and the mask fit together.

    Raises:
        DitAttnError: they do not.
    """
    for name, x in (("q", q), ("k", k)):
        check_tokens(name, x)
    if k.device != q.device:
        raise DitAttnError(f"k is on {k.device} and q on {q.device}; move it")
    check_heads(q, k)
    check_sizes(Sq=q.shape[1], Sk=k.shape[1], q_block=q_block, kv_block=kv_block)
    check_key_mask(k, key_mask)


# -- without checks ----------------------------------------------------------------------------------------------------


def _scores(
    q: torch.Tensor,
    k: torch.Tensor,
    q_block: int,
    kv_block: int,
    scale: float | None,
    key_mask: torch.Tensor | None,
) -> torch.Tensor:
    heads, key_heads = q.shape[2], k.shape[2]
    pooled_q = block_means(q, q_block).unflatten(1, (key_heads, heads // key_heads))
    pooled_k = block_means(k, kv_block, key_mask)[:, :, None]
    with full_precision(q.device):
        scores = (pooled_q @ pooled_k.transpose(-1, -2)).flatten(1, 2)
    scores = scores * (q.shape[-1] ** -0.5 if scale is None else scale)
    return scores + torch.log(block_counts(k, kv_block, key_mask))[:, :, None, :]


def _plan(
    scores: torch.Tensor,
    budget: tuple[Budget | None, Budget | None, int | Sequence[int]],
    forced: torch.Tensor | None,
    sizes: tuple[int, int, int, int],
    stats: bool,
) -> BlockPlan:
    layout = _layout(scores, budget, forced, sizes)
    return BlockPlan(layout, selected_mass(scores, layout), selected_bits(layout)) if stats else BlockPlan(layout)


def _layout(
    scores: torch.Tensor,
    budget: tuple[Budget | None, Budget | None, int | Sequence[int]],
    forced: torch.Tensor | None,
    sizes: tuple[int, int, int, int],
) -> BlockLayout:
    """The layout for ``budget`` = (density, top_p, k_min) and ``sizes`` = (q_len, kv_len, q_block, kv_block)."""
    wanted = resolve_budget(*budget, scores.shape[-1], scores.device)
    if wanted.mass is not None:
        return BlockLayout.from_candidates(*top_p_blocks(scores, wanted.mass, wanted.blocks, forced), *sizes)
    chosen, count = top_k_blocks(scores, wanted.blocks, forced)
    return BlockLayout.from_candidates(chosen if forced is not None else chosen[..., : wanted.most], count, *sizes)


# -- statistics --------------------------------------------------------------------------------------------------------


def block_probabilities(scores: torch.Tensor) -> torch.Tensor:
    """Compute the softmax over the key blocks of scores (B, H, nq, nk), fp32; 0 in a row without a key."""
    return torch.softmax(scores.float(), -1).masked_fill(scores == float("-inf"), 0.0)


def selected_mass(scores: torch.Tensor, layout: BlockLayout) -> torch.Tensor:
    """Compute the fraction (B, H, nq) of the softmax mass of scores (B, H, nq, nk) that lies in the chosen blocks."""
    mass = block_probabilities(scores)
    idx, valid = layout.kv_indices.long(), layout.valid()
    shape = (*mass.shape[:3], idx.shape[-1])
    chosen = mass.gather(-1, idx.clamp(0, mass.shape[-1] - 1).expand(shape))
    return chosen.masked_fill(~valid.expand(shape), 0.0).sum(-1)


def unpack_bits(bits: torch.Tensor, kv_blocks: int) -> torch.Tensor:
    """Unpack (..., ceil(nk / 32)) int32 bits into (..., nk) bool; the inverse of ``selected_bits``."""
    return ((bits[..., None] >> torch.arange(32, device=bits.device)) & 1).flatten(-2)[..., :kv_blocks].bool()
