"""Video families: where the (T, H, W) grid comes from and in which order the parts of the sequence stand."""

from __future__ import annotations

from typing import Any

from dit_attn.processors.families import Family
from dit_attn.processors.tokens import TokenLayout, visual_span


def _wan(config: Any, values: dict[str, Any]) -> TokenLayout:
    """hidden_states: (B, C, T, H, W) latents; the sequence is the video alone."""
    _, _, frames, height, width = values["hidden_states"].shape
    pt, ph, pw = config.patch_size
    return TokenLayout((visual_span("video", (frames // pt, height // ph, width // pw)),))


FAMILIES = (
    Family(
        name="wan",
        models="Wan 2.1, Wan 2.2 (T2V, I2V, A14B, TI2V-5B)",
        transformers=("WanTransformer3DModel",),
        layers=("blocks.*.attn1",),
        reads=("hidden_states",),
        layout=_wan,
    ),
)
