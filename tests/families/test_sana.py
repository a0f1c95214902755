"""Sana, whose self attention is linear and whose cross attention is a softmax."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import SanaTransformer2DModel

import dit_attn
from tests._support.cross_mixin import CrossMixin
from tests._support.family_cases import HEIGHT, WIDTH


class TestSana(CrossMixin):
    cross_sockets = 2

    def model(self) -> torch.nn.Module:
        return SanaTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=12,
            num_layers=2,
            num_cross_attention_heads=2,
            cross_attention_head_dim=12,
            cross_attention_dim=24,
            caption_channels=16,
        )

    def inputs(self) -> dict[str, Any]:
        return {
            "hidden_states": torch.randn(2, 4, HEIGHT, WIDTH),
            "encoder_hidden_states": torch.randn(2, 7, 16),
            "encoder_attention_mask": torch.tensor([[1.0] * 7, [1.0] * 4 + [0.0] * 3]),
            "timestep": torch.tensor([500, 500]),
        }

    def test_linear_attention_is_refused_with_the_reason(self, net: Any) -> None:
        with pytest.raises(dit_attn.DitAttnError, match=r"SanaTransformer2DModel.*linear"):
            dit_attn.enable(net)
