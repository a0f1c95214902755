"""Drop attention heads of a pretrained transformer and refit the output projections to what is left: head calibration.

A procedure of ours; the training of Mixture-of-Head attention (MoH, arXiv 2410.11842), which chooses heads by token, is
another thing.
"""

from dit_attn.pipelines.head_drop.drop import HeadDrop, choose_heads, random_heads
from dit_attn.pipelines.head_drop.profile import HeadProfile, LayerProfile, profile_heads

__all__ = ["HeadDrop", "HeadProfile", "LayerProfile", "choose_heads", "profile_heads", "random_heads"]
