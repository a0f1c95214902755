"""Sol-Attn (arXiv 2607.24027): a block is exact where its pooled score stands out of its row.

With the logits ``S_uj = scale q_u . k_j`` of block means, and the moments of the key means over blocks, mean ``m`` and
covariance ``C``, a block is exact where ``S_uj > scale q_u . m + tau sqrt(scale^2 q_u C q_u + 1e-6)``, or where it is
next to the query block. The score here is the number of standard deviations, so that tau is the setting ``threshold``;
at a given density, one threshold over a head or a layer is the same rule with tau found from the density. The moments
are of the visual blocks (text is always attended to), and those of a row over its blocks are ``m`` and ``C`` exactly.
"""

from __future__ import annotations

import torch

from dit_attn.kernels import block_scores
from dit_attn.kernels.selection.pooling import block_counts
from dit_attn.processors.methods.selectors.base import NEG_INF, Ranking, Selector, SelectorInput

FLOOR = 1e-6
"""Added to the variance, as in the authors' kernel."""


class SolAttn(Selector):
    """Rank by how many standard deviations a pooled score is above the mean of its row."""

    name = "sol"
    takes_probe = False

    def rank(self, call: SelectorInput) -> Ranking:
        """Return standardized logits of block means."""
        rows = call.rows
        scores = block_scores(rows.q, rows.k, call.q_block, call.kv_block, call.scale, rows.key_mask)
        counts = block_counts(rows.k, call.kv_block, rows.key_mask)[:, :, None]
        exists = counts > 0
        logits = torch.where(exists, scores - counts.clamp(min=1.0).log(), 0.0)
        weight = exists.float()
        weight[..., call.visual_blocks :] = 0.0
        weight = weight / weight.sum(-1, keepdim=True).clamp(min=1.0)
        mean = (logits * weight).sum(-1, keepdim=True)
        deviation = ((logits - mean).square() * weight).sum(-1, keepdim=True).add(FLOOR).sqrt()
        return Ranking(((logits - mean) / deviation).masked_fill(~exists, NEG_INF))

    def forced(self, call: SelectorInput) -> torch.Tensor:
        """Return the band of one block around the diagonal."""
        nq, nk = call.grid
        device = call.rows.q.device
        row = torch.arange(nq, device=device)[:, None] * call.q_block
        column = torch.arange(nk, device=device) * call.kv_block
        near = (column < row + call.q_block + call.kv_block) & (column + 2 * call.kv_block > row)
        return (near & (torch.arange(nk, device=device) < call.visual_blocks))[None, None]
