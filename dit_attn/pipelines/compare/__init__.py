"""Compare methods with dense runs of the same prompts and seeds."""

from dit_attn.pipelines.compare.attention_map import AttentionRecorder
from dit_attn.pipelines.compare.comparison import Comparison, compare
from dit_attn.pipelines.compare.match_strength import MatchedScale, match_guidance_scale
from dit_attn.pipelines.compare.records import DENSE, ItemResult, Variant

__all__ = [
    "DENSE",
    "AttentionRecorder",
    "Comparison",
    "ItemResult",
    "MatchedScale",
    "Variant",
    "compare",
    "match_guidance_scale",
]
