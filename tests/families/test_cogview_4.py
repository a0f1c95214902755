"""CogView4."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers import CogView4Transformer2DModel, FlowMatchEulerDiscreteScheduler

from tests._support.family_cases import HEIGHT, SIZE, WIDTH, ImageCase


def cogview4(model: torch.nn.Module, size: dict[str, int]) -> tuple[Any, dict[str, Any]]:
    """CogView4, one transformer call per branch."""
    pipe = diffusers.CogView4Pipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        transformer=model,
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )
    embeds = torch.randn(2, 1, 9, 16)
    return pipe, {"prompt_embeds": embeds[0], "negative_prompt_embeds": embeds[1], "guidance_scale": 3.0, **size}


class TestCogView4(ImageCase):
    kinds = ("text", "image")
    text_args = ("encoder_hidden_states",)
    even_axes = (1,)  # a grid is spread over 256 positions, rounded down

    def model(self) -> torch.nn.Module:
        return CogView4Transformer2DModel(
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            text_embed_dim=16,
            time_embed_dim=8,
            condition_dim=4,
            sample_size=36,
            pos_embed_max_size=32,
            rope_axes_dim=(32, 32),
        )

    def inputs(self) -> dict[str, Any]:
        size = torch.tensor([[256, 256]] * 2)
        return {
            "hidden_states": torch.randn(2, 4, 2 * HEIGHT, 2 * WIDTH),
            "encoder_hidden_states": torch.randn(2, 9, 16),
            "timestep": torch.tensor([500, 500]),
            "original_size": size,
            "target_size": size,
            "crop_coords": torch.zeros(2, 2),
        }

    def pipeline(self) -> tuple[Any, dict[str, Any]]:
        return cogview4(self.model().eval(), SIZE)
