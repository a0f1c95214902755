"""PISA's log-variance route (arXiv 2602.01077): the pooled logit plus the logarithm of the keys' variance.

``scale q_u . k_j + ln tr Var(K_j)``: a block whose keys are all alike is what its mean says it is and need not be
computed. It is the route of the port in SGLang; the paper itself takes the top k of the pooled softmax (``mass``).
"""

from __future__ import annotations

import torch

from dit_attn.kernels.selection.pooling import block_mean_squares, block_means
from dit_attn.processors.methods.pooled_scores import ordered_scores, per_query_head
from dit_attn.processors.methods.selectors.base import Ranking, Selector, SelectorInput


class PISALogVariance(Selector):
    """Rank by the pooled mass times the variance of the block's keys."""

    name = "pisa"
    takes_probe = False

    def rank(self, call: SelectorInput) -> Ranking:
        """Return the pooled logit plus the log-variance; rows compare by their share of the mass."""
        rows = call.rows
        scores = ordered_scores(rows, call.q_block, call.kv_block, call.scale)
        mean = block_means(rows.k, call.kv_block, rows.key_mask)
        square = block_mean_squares(rows.k, call.kv_block, rows.key_mask)
        spread = (square - mean.square()).clamp(min=0.0).sum(-1)
        spread = spread.clamp(min=torch.finfo(spread.dtype).tiny).log()
        level = torch.logsumexp(scores, -1, keepdim=True)
        return Ranking(scores + per_query_head(spread, rows)[:, :, None], level)
