"""Block selection by the exact attention of the very call: the bound of selectors that rank pairs of blocks."""

from __future__ import annotations

from dataclasses import dataclass

from dit_attn.processors.core.call import AttentionCall, Request
from dit_attn.processors.core.token_permute import PermutedTokens
from dit_attn.processors.methods.rectified_spaattn import RectifiedSpaAttn
from dit_attn.processors.methods.selectors.base import Selection
from dit_attn.processors.methods.selectors.measured import measure, ranking_of


@dataclass(frozen=True, kw_only=True)
class OracleSpaAttn(RectifiedSpaAttn):
    """Choose blocks by their exact ``measure`` in this call, at no counted cost.

    It computes the dense attention that it is to save, so it serves measurements alone and has no slug.
    """

    def select(self, rows: PermutedTokens, call: AttentionCall, request: Request) -> Selection:
        """Return the blocks of a sparse step."""
        given = self.selector_input(rows, call.softmax_scale)
        return self._chosen(ranking_of(given, measure(given, self.measure), self.measure), None, rows, call)
