"""Choosing key blocks from pooled queries and keys."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from dit_attn.errors import DitAttnError
from dit_attn.kernels.layout import BlockLayout, ceil_div


def pool_blocks(x: torch.Tensor, block: int, mask: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean over the valid tokens of every block.

    Args:
        x: (B, S, H, D).
        block: tokens per block; the last block may be ragged.
        mask: (B, S) bool, tokens that exist; ``None`` for all.

    Returns:
        means (B, H, n, D) fp32 (0 for a block without a valid token), counts (B|1, 1, n) fp32.
    """
    batch, seq, heads, dim = x.shape
    n = ceil_div(seq, block)
    tail = n * block - seq
    if mask is None:
        counts = torch.full((1, 1, n), float(block), device=x.device)
        counts[..., -1] -= tail
        full = seq // block
        # Whole blocks are summed without copying the sequence; the ragged one apart.
        parts = [x[:, : full * block].unflatten(1, (full, block)).sum(2, dtype=torch.float32)] if full else []
        if tail:
            parts.append(x[:, full * block :].sum(1, keepdim=True, dtype=torch.float32))
        sums = torch.cat(parts, 1)
    else:
        weights = F.pad(mask, (0, tail)).unflatten(1, (n, block))
        counts = weights.sum(-1, dtype=torch.float32)[:, None]
        kept = x.masked_fill(~mask[..., None, None], 0.0)
        sums = F.pad(kept, (0, 0, 0, 0, 0, tail)).unflatten(1, (n, block)).sum(2, dtype=torch.float32)
    return sums.transpose(1, 2) / counts.clamp(min=1.0)[..., None], counts


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
    block without a valid key gets ``-inf``.

    Args:
        q: (B, Sq, H, D).
        k: (B, Sk, Hk, D); ``H % Hk == 0``.
        q_block, kv_block: tokens per block.
        scale: softmax scale, default ``D ** -0.5``.
        key_mask: (B, Sk) bool, keys that exist.

    Returns:
        (B, H, nq, nk) fp32.
    """
    pooled_q, _ = pool_blocks(q, q_block)
    pooled_k, counts = pool_blocks(k, kv_block, key_mask)
    if pooled_q.shape[1] % pooled_k.shape[1]:
        raise DitAttnError(f"q has {q.shape[2]} heads, which is not a multiple of the {k.shape[2]} heads of k")
    groups = pooled_q.shape[1] // pooled_k.shape[1]
    pooled_k = pooled_k.repeat_interleave(groups, 1) if groups > 1 else pooled_k
    scores = pooled_q @ pooled_k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return scores + torch.log(counts)[:, :, None, :]


def select_blocks(
    scores: torch.Tensor,
    *,
    density: float | None = None,
    top_p: float | None = None,
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
        forced: broadcastable bool, blocks that are always kept.
        q_len, kv_len: tokens.
        q_block, kv_block: tokens per block.

    Raises:
        DitAttnError: both or neither of density and top_p.
    """
    sizes = {"q_len": q_len, "kv_len": kv_len, "q_block": q_block, "kv_block": kv_block}
    if (density is None) == (top_p is None):
        raise DitAttnError("select_blocks takes exactly one of density and top_p")
    if density is not None:
        # The small slack keeps a product like 0.07 * 100 = 7.000000000000001 from costing a block.
        count = math.ceil(density * scores.shape[-1] - 1e-9)
        return BlockLayout.from_topk(scores, count, forced=forced, **sizes)
    assert top_p is not None
    return BlockLayout.from_topp(scores, top_p, forced=forced, **sizes)
