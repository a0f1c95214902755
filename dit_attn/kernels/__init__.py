"""Block-sparse attention: layouts, block selection, and one operator with interchangeable backends."""

from dit_attn.kernels.backends.cpp.library import build as build_cpp
from dit_attn.kernels.backends.reference import reference_attention
from dit_attn.kernels.backends.registry import BACKENDS, Choice
from dit_attn.kernels.functional import choose_backend, sparse_attention
from dit_attn.kernels.layouts.block_layout import BlockLayout
from dit_attn.kernels.layouts.flex_mask import from_flex, to_flex
from dit_attn.kernels.layouts.patterns import band, from_lengths, from_segments, sink_window
from dit_attn.kernels.layouts.token_order import TokenOrder, token_order
from dit_attn.kernels.layouts.windows import inward_window, snapped_window, window_tile
from dit_attn.kernels.linear.functional import linear_attention
from dit_attn.kernels.numeric_guard import numeric_guard
from dit_attn.kernels.selection.pooling import pool_blocks
from dit_attn.kernels.selection.select import BlockPlan, block_scores, plan_blocks, plan_scores, select_blocks
from dit_attn.kernels.terms import Compensation, Epilogue, LogitBias, Terms, pooled_compensation, sampled_compensation

__all__ = [
    "BACKENDS",
    "BlockLayout",
    "BlockPlan",
    "Choice",
    "Compensation",
    "Epilogue",
    "LogitBias",
    "Terms",
    "TokenOrder",
    "band",
    "block_scores",
    "build_cpp",
    "choose_backend",
    "from_flex",
    "from_lengths",
    "from_segments",
    "inward_window",
    "linear_attention",
    "numeric_guard",
    "plan_blocks",
    "plan_scores",
    "pool_blocks",
    "pooled_compensation",
    "reference_attention",
    "sampled_compensation",
    "select_blocks",
    "sink_window",
    "snapped_window",
    "sparse_attention",
    "to_flex",
    "token_order",
    "window_tile",
]
