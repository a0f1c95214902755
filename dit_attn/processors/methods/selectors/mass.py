"""Pooled mass: the softmax over block means, the common baseline; SpargeAttn (arXiv 2502.18137) ranks so.

The score of a visual block is ``scale q_u . k_j + ln n_j`` of means ``q_u``, ``k_j`` and the number ``n_j`` of keys;
that of a block with other tokens is the log-sum-exp of its tokens. With ``probe`` the means are of chunks, and a block
has the sum of its chunks' masses.
"""

from __future__ import annotations

import torch

from dit_attn.kernels.selection.select import block_probabilities
from dit_attn.processors.methods.pooled_scores import ordered_scores
from dit_attn.processors.methods.selectors.base import (
    NEG_INF,
    Ranking,
    Selector,
    SelectorInput,
    log_of,
    sum_of_chunks,
)


class PooledMass(Selector):
    """Rank by the pooled softmax mass."""

    name = "mass"

    def rank(self, call: SelectorInput) -> Ranking:
        """Return logits of the blocks; with ``probe`` the logarithm of their share of the mass."""
        scores = ordered_scores(call.rows, call.q_block, call.kv_block, call.scale)
        if call.probe is None:
            return Ranking(scores, torch.logsumexp(scores, -1, keepdim=True))
        return Ranking(log_of(chunk_masses(call, call.probe), scores > NEG_INF))

    def cost(self, probe: int | None) -> float:
        """Return the cost of one product of chunk means."""
        return 0.0 if probe is None else 0.5 / probe**2


def chunk_masses(call: SelectorInput, size: int) -> torch.Tensor:
    """(B, H, nq, nk) softmax mass of every block, summed over its chunks of ``size`` tokens."""
    parts = []
    for part in call.heads_apart(size, size):
        found = block_probabilities(ordered_scores(part.rows, size, size, call.scale))
        parts.append(sum_of_chunks(found, call.q_block // size, call.kv_block // size))
    return torch.cat(parts, 1)
