"""SubBlock: the log-sum-exp over the logits of sub-block means, 4 x 4 of them for every pair of blocks.

A block that matters to a quarter of the queries, or with a quarter of its keys, is seen. No paper: the rule is that of
the sub-block backend of SGLang's diffusion engine (KeySplit is the same with whole query blocks).
"""

from __future__ import annotations

import torch

from dit_attn.processors.methods.pooled_scores import ordered_scores
from dit_attn.processors.methods.selectors.base import NEG_INF, Ranking, Selector, SelectorInput, common_divisor

PARTS = 4
"""Sub-blocks along each side of a pair of blocks."""


class SubBlock(Selector):
    """Rank by the log-sum-exp over sub-block means."""

    name = "sub-block"

    def rank(self, call: SelectorInput) -> Ranking:
        """Return the log-sum-exp of the chunks' logits."""
        size = call.probe or self.own_probe(call.q_block, call.kv_block)
        q_parts, k_parts = call.q_block // size, call.kv_block // size
        found = []
        for part in call.heads_apart(size, size):
            logits = ordered_scores(part.rows, size, size, call.scale)
            missing = (-logits.shape[-1] % k_parts, -logits.shape[-2] % q_parts)
            logits = torch.nn.functional.pad(logits, (0, missing[0], 0, missing[1]), value=NEG_INF)
            found.append(logits.unflatten(-1, (-1, k_parts)).logsumexp(-1).unflatten(-2, (-1, q_parts)).logsumexp(-2))
        scores = torch.cat(found, 1)
        return Ranking(scores, torch.logsumexp(scores, -1, keepdim=True))

    def own_probe(self, q_block: int, kv_block: int) -> int:
        """Return a quarter of the smaller block, or the largest common divisor below that."""
        return common_divisor(q_block, kv_block, max(1, min(q_block, kv_block) // PARTS))

    def cost(self, probe: int | None) -> float:
        """Return the cost of one product of sub-block means."""
        assert probe is not None
        return 0.5 / probe**2
