"""Pooled error: the pooled mass times the distance of the block's mean value to the row's estimated output.

Skipping or averaging a block changes the output by that, to first order. The product with the value is this project's;
the pooled mass is that of Rectified SpaAttn (arXiv 2511.19835). With ``probe`` the score is the root of the sum of the
squares over chunks.
"""

from __future__ import annotations

import torch

from dit_attn.kernels import pool_blocks
from dit_attn.kernels.device import full_precision
from dit_attn.kernels.selection.select import block_probabilities
from dit_attn.processors.methods.pooled_scores import ordered_scores, per_query_head
from dit_attn.processors.methods.selectors.base import (
    NEG_INF,
    Ranking,
    Selector,
    SelectorInput,
    log_of,
    sum_of_chunks,
)


class PooledError(Selector):
    """Rank by the estimated error of skipping a block."""

    name = "error"

    def rank(self, call: SelectorInput) -> Ranking:
        """Return the logarithm of the error."""
        scores = ordered_scores(call.rows, call.q_block, call.kv_block, call.scale)
        if call.probe is None:
            return Ranking(scores + _log_distance(scores, call), torch.logsumexp(scores, -1, keepdim=True))
        parts = [_chunk_errors(part, call.probe) for part in call.heads_apart(call.probe, call.probe)]
        return Ranking(log_of(torch.cat(parts, 1), scores > NEG_INF))

    def cost(self, probe: int | None) -> float:
        """Return the cost of three products of chunk means: scores, outputs, distances."""
        return 0.0 if probe is None else 1.5 / probe**2


def _log_distance(scores: torch.Tensor, call: SelectorInput) -> torch.Tensor:
    """(B, H, nq, nk) log-distance of every block's mean value to the row's estimated output."""
    values = per_query_head(pool_blocks(call.rows.v, call.kv_block, call.rows.key_mask), call.rows)
    with full_precision(scores.device):
        out = block_probabilities(scores) @ values
        distance = torch.cdist(out, values)
    return distance.clamp(min=torch.finfo(distance.dtype).tiny).log()


def _chunk_errors(call: SelectorInput, size: int) -> torch.Tensor:
    """(B, H, nq, nk) root of the squared errors of every block, summed over chunks of ``size`` tokens."""
    found = block_probabilities(ordered_scores(call.rows, size, size, call.scale))
    values = per_query_head(pool_blocks(call.rows.v, size, call.rows.key_mask), call.rows)
    with full_precision(found.device):
        found = (found * torch.cdist(found @ values, values)).square()
    return sum_of_chunks(found, call.q_block // size, call.kv_block // size).sqrt()
