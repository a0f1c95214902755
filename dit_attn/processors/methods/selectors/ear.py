"""SVG-EAR (arXiv 2603.08982): the error that a compensated block leaves, probed by mean queries on all keys.

For the mean query of a query block (or several, one for every ``probe`` queries), with the weights ``a_t`` of the keys
and ``c_j`` of the mean key of block j:

* ``ear``, the paper's value form: ``e_uj = sum_t |a_t v_t - c_j v_j|^2``, divided by the area of the pair of blocks. It
  sums the errors of single tokens, so that it charges a block whose keys are all alike, which compensates exactly.
* ``ear-centered``: ``|sum_t a_t (v_t - o) - sum_c w_c (v_c - o)|^2`` with the probe's own output o and the method's own
  pooled keys c: the norm of the sum, the error of the denominator with it.

The scores are the roots, relative to the softmax denominator of the probe.
"""

from __future__ import annotations

import torch

from dit_attn.kernels import pool_blocks
from dit_attn.kernels.block_stats import attention_with_block_stats
from dit_attn.kernels.device import full_precision
from dit_attn.kernels.layouts.block_layout import ceil_div
from dit_attn.kernels.selection.pooling import block_counts
from dit_attn.processors.methods.pooled_scores import per_query_head
from dit_attn.processors.methods.selectors.base import Ranking, Selector, SelectorInput, log_of, sum_of_chunks


class EARValue(Selector):
    """Rank by the summed squared errors of single tokens."""

    name = "ear"

    def rank(self, call: SelectorInput) -> Ranking:
        """Return the logarithm of the root of the error by area."""
        size = call.probe or call.q_block
        squared = torch.cat([_value_form(part, size) for part in call.heads_apart(size, 1)], 1)
        squared = sum_of_chunks(squared, call.q_block // size, 1)
        area = block_counts(call.rows.k, call.kv_block, call.rows.key_mask)[:, :, None].clamp(min=1.0)
        return Ranking(log_of((squared / area).sqrt(), call.has_keys()))

    def own_probe(self, q_block: int, kv_block: int) -> int:
        """Return the query block."""
        return q_block

    def cost(self, probe: int | None) -> float:
        """Return the cost of a product of the probes with all keys."""
        assert probe is not None
        return 0.5 / probe


class EARCentered(EARValue):
    """Rank by the norm of a block's summed error."""

    name = "ear-centered"

    def rank(self, call: SelectorInput) -> Ranking:
        """Return the logarithm of the root of the error."""
        size, rows = call.probe or call.q_block, call.rows
        found = attention_with_block_stats(
            pool_blocks(rows.q, size).transpose(1, 2), rows.k.float(), rows.v.float(), q_block=call.q_block // size,
            kv_block=call.kv_block, pooled=call.pooled, scale=call.scale, key_mask=rows.key_mask,
            key_bias=rows.key_bias,
        )  # fmt: skip
        return Ranking(log_of(found.blocks.float().sqrt(), call.has_keys()))

    def cost(self, probe: int | None) -> float:
        """Return the cost of the attention of the probes."""
        assert probe is not None
        return 1.0 / probe


def _value_form(call: SelectorInput, size: int) -> torch.Tensor:
    """(B, H, probes, nk) the paper's squared error for the mean of every ``size`` queries."""
    rows, nk = call.rows, call.grid[1]
    k, v = (per_query_head(x.transpose(1, 2).float(), rows) for x in (rows.k, rows.v))
    mean_k, mean_v = (per_query_head(pool_blocks(x, call.kv_block, rows.key_mask), rows) for x in (rows.k, rows.v))
    counts = block_counts(rows.k, call.kv_block, rows.key_mask)[:, :, None]
    owner = torch.arange(k.shape[2], device=k.device) // call.kv_block
    probes = pool_blocks(rows.q, size) * call.scale
    with full_precision(k.device):
        logits = probes @ k.mT
        added = call.key_logit_bias()
        logits = logits if added is None else logits + added
        lse = torch.logsumexp(logits, -1, keepdim=True).nan_to_num(neginf=0.0)
        weight = torch.exp(logits - lse)
        at_mean = torch.exp(probes @ mean_k.mT - lse).masked_fill(counts == 0, 0.0)
    along = (v * mean_v[:, :, owner]).sum(-1)[:, :, None]  # v_t . v_j
    own = v.square().sum(-1)[:, :, None]
    fitted = _by_block(weight * along, call.kv_block, nk)
    single = _by_block(weight.square() * own, call.kv_block, nk)
    size_of_mean = (counts * mean_v.square().sum(-1)[:, :, None]) * at_mean.square()
    return (single - 2.0 * at_mean * fitted + size_of_mean).clamp(min=0.0)


def _by_block(x: torch.Tensor, block: int, count: int) -> torch.Tensor:
    """Sums (..., count) of (..., S) over blocks."""
    assert ceil_div(x.shape[-1], block) == count
    return torch.nn.functional.pad(x, (0, count * block - x.shape[-1])).unflatten(-1, (count, block)).sum(-1)
