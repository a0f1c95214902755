"""Plain block-sparse attention: every query block attends to the key blocks with the largest pooled scores.

The baseline of every other sparse method. Scores are mean-pooled queries times mean-pooled keys, per head; the best
blocks are chosen by count (``density``) or by probability mass (``top_p``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dit_attn.errors import DitAttnError
from dit_attn.kernels import plan_blocks
from dit_attn.processors.core.call import AttentionCall, Request
from dit_attn.processors.core.token_permute import forced_blocks
from dit_attn.processors.methods.base import setting
from dit_attn.processors.methods.sparse import SparseMethod


@dataclass(frozen=True)
class BlockSparse(SparseMethod):
    """Attend to the best key blocks of every query block.

    Give ``density`` or ``top_p``. Blocks and dense exceptions are settings of every :class:`SparseMethod`.

    Attributes:
        density: fraction of the key blocks each query block attends to, in (0, 1]. 1 is bit-equal to stock attention.
        top_p: alternatively, the fewest blocks whose pooled softmax mass reaches this, in (0, 1].
        keep: blocks that are always computed: ``text``, ``first-frame``, ``diagonal`` (they count inside the budget).

    Raises:
        DitAttnError: a value out of range, or both or neither of density and top_p.
    """

    slug: ClassVar[str] = "block-sparse"

    density: float | None = setting(None, "fraction of key blocks attended to", low=1e-6, high=1.0)
    top_p: float | None = setting(None, "pooled softmax mass attended to", low=1e-6, high=1.0)
    keep: tuple[str, ...] = setting(
        ("text", "diagonal"), "blocks that are always attended to", choices=("text", "first-frame", "diagonal")
    )

    def __post_init__(self) -> None:
        if self.density is not None and self.top_p is not None:
            raise DitAttnError("block-sparse takes density or top_p, not both: each sets the number of blocks")
        if self.density is None and self.top_p is None:
            object.__setattr__(self, "density", 0.25)
        super().__post_init__()

    @property
    def is_dense(self) -> bool:
        """Whether the settings keep everything."""
        return (self.density or self.top_p or 0.0) >= 1.0

    @property
    def executed(self) -> float | None:
        """The density, ``None`` with top_p."""
        return self.density

    def plan(self, call: AttentionCall, request: Request) -> None:
        """Set the layout of the visual rows."""
        tokens = call.tokens
        assert tokens is not None
        request.layout = plan_blocks(
            call.q[:, call.visual],
            call.k,
            q_block=self.q_block,
            kv_block=self.kv_block,
            density=self.density,
            top_p=self.top_p,
            forced=forced_blocks(tokens, self.keep, self.q_block, self.kv_block, call.q.device),
            key_mask=request.key_mask,
            scale=call.scale,
        ).layout


