"""Attention over selected key blocks: layouts, selection, and one operator with interchangeable backends."""

from dit_attn.kernels.layout import BlockLayout
from dit_attn.kernels.ops import BACKENDS, Choice, choose_backend, sparse_attention
from dit_attn.kernels.reference import reference_attention
from dit_attn.kernels.selection import block_scores, pool_blocks, select_blocks

__all__ = [
    "BACKENDS",
    "BlockLayout",
    "Choice",
    "block_scores",
    "choose_backend",
    "pool_blocks",
    "reference_attention",
    "select_blocks",
    "sparse_attention",
]
