"""Leave out attention heads of a pretrained transformer and refit the output projections to the others.

Or let every token choose its heads by what was measured. Head calibration, a procedure of ours; the training of
Mixture-of-Head attention (MoH, arXiv 2410.11842) is another thing.
"""

from dit_attn.pipelines.head_drop.choose import choose_heads, first_heads, named_heads, random_heads
from dit_attn.pipelines.head_drop.dropped import DroppedHeads
from dit_attn.pipelines.head_drop.profile import HeadProfile, LayerProfile, profile_heads, profile_parts
from dit_attn.pipelines.head_drop.profile_file import load_profile, save_profile
from dit_attn.pipelines.head_drop.route import RoutedHeads, calibrate_routing

__all__ = [
    "DroppedHeads",
    "HeadProfile",
    "LayerProfile",
    "RoutedHeads",
    "calibrate_routing",
    "choose_heads",
    "first_heads",
    "load_profile",
    "named_heads",
    "profile_heads",
    "profile_parts",
    "random_heads",
    "save_profile",
]
