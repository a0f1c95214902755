"""DFSAttn (arXiv 2605.23445): the softmax over tiles of 16 tokens, summed over the tiles of a block.

Every tile of queries has a softmax of its own, so the score of a block is the mass that its tiles expect it to have.
The order that the paper combines it with is the Hilbert curve (``order="hilbert"``), its schedule a mask that is kept
for several steps. Here a ragged tile counts the tokens it has, where the authors' code fills it up with zeros.
"""

from __future__ import annotations

from dit_attn.processors.methods.selectors.base import Ranking, Selector, SelectorInput, common_divisor, log_of
from dit_attn.processors.methods.selectors.mass import chunk_masses

TILE = 16
"""Tokens of a tile (B_s)."""


class DFSAttn(Selector):
    """Rank by the summed softmax mass of small tiles."""

    name = "dfs"

    def rank(self, call: SelectorInput) -> Ranking:
        """Return the logarithm of the mass."""
        size = call.probe or self.own_probe(call.q_block, call.kv_block)
        return Ranking(log_of(chunk_masses(call, size), call.has_keys()))

    def own_probe(self, q_block: int, kv_block: int) -> int:
        """Return 16, or the largest common divisor of the blocks below that."""
        return common_divisor(q_block, kv_block, TILE)

    def cost(self, probe: int | None) -> float:
        """Return the cost of one product of tile means."""
        assert probe is not None
        return 0.5 / probe**2
