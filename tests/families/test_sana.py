"""Sana, whose attention is linear."""

from __future__ import annotations

import pytest
from diffusers import SanaTransformer2DModel

import dit_attn


def test_linear_attention_is_refused_with_the_reason() -> None:
    model = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=16,
    )
    with pytest.raises(dit_attn.DitAttnError, match=r"SanaTransformer2DModel.*linear"):
        dit_attn.enable(model)
