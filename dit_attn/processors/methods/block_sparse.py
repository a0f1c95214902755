"""Plain block-sparse attention: every query block attends to the key blocks that score best.

The baseline of every other sparse method. By default scores are mean-pooled queries times mean-pooled keys, per head;
the best blocks are chosen by count (``density``) or by probability mass (``top_p``). ``selector`` names other rules.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from dit_attn.errors import DitAttnError
from dit_attn.kernels import plan_blocks
from dit_attn.processors.core.call import AttentionCall, Request
from dit_attn.processors.core.token_permute import PermutedTokens, forced_blocks
from dit_attn.processors.methods.base import setting
from dit_attn.processors.methods.head_budget import budget_of_call, is_full
from dit_attn.processors.methods.selecting import SelectingMethod


@dataclass(frozen=True, kw_only=True)
class BlockSparse(SelectingMethod):
    """Attend to the best key blocks of every query block.

    Give ``density``, ``top_p`` or ``threshold``. The selector and who shares the budget are settings of every
    :class:`~dit_attn.processors.methods.selecting.SelectingMethod`, blocks and dense exceptions of every sparse method.

    Attributes:
        density: fraction of the key blocks each query block attends to, in (0, 1]: a number, or one for each head. 1 is
            bit-equal to stock attention.
        top_p: alternatively, the fewest blocks whose pooled softmax mass reaches this, in (0, 1]; likewise.
        keep: blocks that are always computed: ``text``, ``first-frame``, ``diagonal`` (they count inside the budget).

    Raises:
        DitAttnError: a value out of range, or both or neither of density and top_p.
    """

    slug: ClassVar[str] = "block-sparse"

    density: float | tuple[float, ...] | None = setting(
        None, "fraction of key blocks attended to, of all heads or of each", low=1e-6, high=1.0, unset=0.25
    )
    top_p: float | tuple[float, ...] | None = setting(
        None, "pooled softmax mass attended to, of all heads or of each", low=1e-6, high=1.0
    )
    keep: tuple[str, ...] = setting(
        ("text", "diagonal"), "blocks that are always attended to", choices=("text", "first-frame", "diagonal")
    )

    def __post_init__(self) -> None:
        if self.density is not None and self.top_p is not None:
            raise DitAttnError("block-sparse takes density or top_p, not both: each sets the number of blocks")
        if self.density is None and self.top_p is None and self.threshold is None:
            object.__setattr__(self, "density", 0.25)
        super().__post_init__()

    @property
    def is_dense(self) -> bool:
        """Whether the settings keep everything."""
        return is_full(self.density) or is_full(self.top_p)

    def plan(self, call: AttentionCall, request: Request) -> None:
        """Set the layout of the visual rows."""
        tokens = call.tokens
        assert tokens is not None
        if self.selector != "mass" or self.probe or self.threshold is not None or self.spread != "row":
            request.permuted = rows = self.rows_of(call, request)
            with torch.no_grad():
                request.layout = self.select(rows, call, request).layout
            return
        request.layout = plan_blocks(
            call.q[:, call.visual],
            call.k,
            q_block=self.q_block,
            kv_block=self.kv_block,
            density=None if self.density is None else budget_of_call(self.density, call),
            top_p=None if self.top_p is None else budget_of_call(self.top_p, call),
            forced=forced_blocks(tokens, self.keep, self.q_block, self.kv_block, call.q.device),
            key_mask=request.key_mask,
            scale=call.scale,
        ).layout

    def rows_of(self, call: AttentionCall, request: Request) -> PermutedTokens:
        """Return the tensors with the visual tokens first, in their own order."""
        return request.permute(call, "none")

    def forced_of(self, rows: PermutedTokens) -> torch.Tensor | None:
        """Return the blocks of ``keep``."""
        if not self.keep:
            return None
        return rows.order.forced(self.keep, rows.k.shape[1], self.q_block, self.kv_block, "text" in self.keep)
