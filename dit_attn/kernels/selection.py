"""Choosing key blocks from pooled queries and keys.

Every query block is represented by the mean of its queries and every key block by the mean of its keys; their product
estimates the block's logits. Everything here is linear in the sequence but for the (nq, nk) table of block scores.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from dit_attn.errors import DitAttnError
from dit_attn.kernels.layout import BlockLayout, ceil_div


def pool_blocks(x: torch.Tensor, block: int, key_mask: torch.Tensor | None = None) -> torch.Tensor:
    """Mean over the valid tokens of every block.

    Args:
        x: (B, S, H, D).
        block: tokens per block; the last block may be ragged.
        key_mask: (B, S) bool, tokens that exist; ``None`` for all.

    Returns:
        (B, H, n, D) fp32; 0 for a block without a valid token.
    """
    seq = x.shape[1]
    n, full = ceil_div(seq, block), seq // block
    if key_mask is not None:
        x = x.masked_fill(~key_mask[..., None, None], 0.0)
    # Whole blocks are summed without copying the sequence; the ragged one apart.
    parts = [x[:, : full * block].unflatten(1, (full, block)).sum(2, dtype=torch.float32)] if full else []
    if n > full:
        parts.append(x[:, full * block :].sum(1, keepdim=True, dtype=torch.float32))
    sums = torch.cat(parts, 1) if len(parts) > 1 else parts[0]
    counts = block_counts(x, block, key_mask)
    return sums.transpose(1, 2) / counts.clamp(min=1.0)[..., None]


def block_counts(x: torch.Tensor, block: int, key_mask: torch.Tensor | None = None) -> torch.Tensor:
    """(B|1, 1, n) fp32, the valid tokens of every block of x (B, S, H, D)."""
    seq = x.shape[1]
    n = ceil_div(seq, block)
    if key_mask is not None:
        return F.pad(key_mask, (0, n * block - seq)).unflatten(1, (n, block)).sum(-1, dtype=torch.float32)[:, None]
    starts = torch.arange(n, device=x.device) * block
    return (seq - starts).clamp(max=block).to(torch.float32).view(1, 1, n)


def block_scores(
    q: torch.Tensor,
    k: torch.Tensor,
    q_block: int,
    kv_block: int,
    scale: float | None = None,
    key_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Logit of every (query block, key block) pair from their pooled vectors.

    The logarithm of the number of valid keys is added, so that a softmax over the row weighs a ragged block rightly; a
    block without a valid key gets ``-inf`` and is never chosen.

    Args:
        q: (B, S, H, D).
        k: (B, Sk, Hk, D); ``H % Hk == 0``.
        q_block, kv_block: tokens per block.
        scale: softmax scale, default ``D ** -0.5``.
        key_mask: (B, Sk) bool, keys that exist.

    Returns:
        (B, H, nq, nk) fp32.

    Raises:
        DitAttnError: the heads of q are no multiple of those of k.
    """
    heads, key_heads = q.shape[2], k.shape[2]
    if heads % key_heads:
        raise DitAttnError(f"q has {heads} heads, which is not a multiple of the {key_heads} heads of k")
    pooled_q = pool_blocks(q, q_block).unflatten(1, (key_heads, heads // key_heads))
    pooled_k = pool_blocks(k, kv_block, key_mask)[:, :, None]
    scores = (pooled_q @ pooled_k.transpose(-1, -2)).flatten(1, 2)
    scores = scores * (q.shape[-1] ** -0.5 if scale is None else scale)
    return scores + torch.log(block_counts(k, kv_block, key_mask))[:, :, None, :]


def select_blocks(
    scores: torch.Tensor,
    *,
    density: float | None = None,
    top_p: float | None = None,
    k_min: int = 1,
    forced: torch.Tensor | None = None,
    q_len: int,
    kv_len: int,
    q_block: int,
    kv_block: int,
) -> BlockLayout:
    """The layout for a budget.

    Args:
        scores: (B, H, nq, nk) fp32 logits from :func:`block_scores`.
        density: fraction of key blocks per query block; ``ceil(density * nk)`` are kept, forced ones inside the budget.
        top_p: alternatively, softmax mass to keep.
        k_min: with ``top_p``, the smallest number of blocks per row.
        forced: broadcastable bool, blocks that are always kept.
        q_len, kv_len: tokens.
        q_block, kv_block: tokens per block.

    Raises:
        DitAttnError: both or neither of density and top_p, or one out of (0, 1].
    """
    if (density is None) == (top_p is None):
        raise DitAttnError(f"give exactly one of density and top_p, got density={density} and top_p={top_p}")
    if top_p is not None:
        return BlockLayout.from_topp(
            scores, top_p, k_min, forced, q_len=q_len, kv_len=kv_len, q_block=q_block, kv_block=kv_block
        )
    assert density is not None
    if not 0.0 < density <= 1.0:
        raise DitAttnError(f"density is the share of key blocks kept per query block, in (0, 1], got {density}")
    # The small slack keeps a product like 0.07 * 100 = 7.000000000000001 from costing a block.
    count = math.ceil(density * scores.shape[-1] - 1e-9)
    return BlockLayout.from_topk(
        scores, count, forced, q_len=q_len, kv_len=kv_len, q_block=q_block, kv_block=kv_block
    )
