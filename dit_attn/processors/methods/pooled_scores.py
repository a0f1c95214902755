"""Pooled attention scores of blocks in a permuted sequence; shared by RectifiedSpaAttn and ReTtention."""

from __future__ import annotations

from dataclasses import replace

import torch

from dit_attn.kernels import block_scores, pool_blocks
from dit_attn.kernels.device import full_precision
from dit_attn.kernels.layouts.block_layout import ceil_div
from dit_attn.processors.core.token_permute import PermutedTokens

AT_ONCE = 2**28  # bytes of a matrix of chunk scores


def ordered_scores(rows: PermutedTokens, q_block: int, kv_block: int, scale: float) -> torch.Tensor:
    """Return the logarithm of the pooled weight of every key block: visual blocks by means, other tokens one by one.

    Neighboring text tokens have little in common, and some are sinks: the mean of a block of them means nothing. The
    score of a block with such a token is the log-sum-exp (LSE) of its tokens; that of a visual block is its mean's
    logit plus the logarithm of its token count. A softmax over the row is the pooled attention matrix A of Rectified
    SpaAttn (arXiv 2511.19835, IPAR).

    Args:
        rows: the permuted call.
        q_block, kv_block: tokens per block.
        scale: softmax scale.

    Returns:
        (B, H, nq, nk) fp32; ``-inf`` for a block without a key that exists.
    """
    visual, seq_len = rows.order.visual, rows.k.shape[1]
    if visual == seq_len:
        return block_scores(rows.q, rows.k, q_block, kv_block, scale, rows.key_mask)
    pure = visual // kv_block * kv_block
    parts = []
    if pure:
        mask = None if rows.key_mask is None else rows.key_mask[:, :pure]
        parts.append(block_scores(rows.q, rows.k[:, :pure], q_block, kv_block, scale, mask))
    q = pool_blocks(rows.q, q_block)
    k = per_query_head(rows.k[:, pure:].transpose(1, 2).float(), rows)
    with full_precision(q.device):
        logits = q @ k.transpose(-1, -2) * scale
    if rows.key_bias is not None:
        logits = logits + rows.key_bias[:, :, None, pure:]
    elif rows.key_mask is not None:
        logits = logits.masked_fill(~rows.key_mask[:, None, None, pure:], float("-inf"))
    blocks = ceil_div(seq_len - pure, kv_block)
    padded = torch.nn.functional.pad(logits, (0, blocks * kv_block - logits.shape[-1]), value=float("-inf"))
    parts.append(padded.unflatten(-1, (blocks, kv_block)).logsumexp(-1))
    return torch.cat(parts, -1)


def heads_apart(rows: PermutedTokens, q_size: int, k_size: int) -> list[PermutedTokens]:
    """Return the same rows a few heads at a time, so that scores of so many tokens each stay within :data:`AT_ONCE`."""
    batch, q_len, heads, _ = rows.q.shape
    key_heads = rows.k.shape[2]
    each = 4 * batch * ceil_div(q_len, q_size) * ceil_div(rows.k.shape[1], k_size) * (heads // key_heads)
    step = max(1, AT_ONCE // max(1, each))
    if step >= key_heads:
        return [rows]
    ratio, bias = heads // key_heads, rows.key_bias
    return [
        replace(
            rows,
            q=rows.q[:, :, low * ratio : (low + step) * ratio],
            k=rows.k[:, :, low : low + step],
            v=rows.v[:, :, low : low + step],
            key_bias=bias if bias is None or bias.shape[1] == 1 else bias[:, low * ratio : (low + step) * ratio],
        )
        for low in range(0, key_heads, step)
    ]


def per_query_head(x: torch.Tensor, rows: PermutedTokens) -> torch.Tensor:
    """Repeat (B, Hk, ...) to (B, H, ...)."""
    return x.repeat_interleave(rows.q.shape[2] // rows.k.shape[2], 1)
