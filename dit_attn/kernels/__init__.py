"""Attention over selected key blocks: layouts, selection, and one operator with interchangeable backends."""

from dit_attn.kernels.guard import numeric_guard
from dit_attn.kernels.layout import BlockLayout
from dit_attn.kernels.ops import BACKENDS, Choice, choose_backend, sparse_attention
from dit_attn.kernels.patterns import band, from_flex, from_lengths, from_segments, inward_window, sink_window, to_flex
from dit_attn.kernels.reference import reference_attention
from dit_attn.kernels.selection import BlockPlan, block_scores, plan_blocks, plan_scores, pool_blocks, select_blocks
from dit_attn.kernels.terms import Compensation, Epilogue, LogitBias, Terms, pooled_compensation

__all__ = [
    "BACKENDS",
    "BlockLayout",
    "BlockPlan",
    "Choice",
    "Compensation",
    "Epilogue",
    "LogitBias",
    "Terms",
    "band",
    "block_scores",
    "choose_backend",
    "from_flex",
    "from_lengths",
    "from_segments",
    "inward_window",
    "numeric_guard",
    "plan_blocks",
    "plan_scores",
    "pool_blocks",
    "pooled_compensation",
    "reference_attention",
    "select_blocks",
    "sink_window",
    "sparse_attention",
    "to_flex",
]
