"""Ovis-Image."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, OvisImagePipeline, OvisImageTransformer2DModel

from tests._support.family_cases import HEIGHT, SIZE, WIDTH, PackedCase, image_ids


class TestOvisImage(PackedCase):
    kinds = ("text", "image")
    text_args = ("encoder_hidden_states",)

    def model(self) -> torch.nn.Module:
        return OvisImageTransformer2DModel(
            in_channels=16,
            out_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(4, 4, 8),
        )

    def inputs(self) -> dict[str, Any]:
        return {
            "hidden_states": torch.randn(2, HEIGHT * WIDTH, 16),
            "encoder_hidden_states": torch.randn(2, 9, 16),
            "timestep": torch.tensor([0.5, 0.5]),
            "img_ids": image_ids(),
            "txt_ids": torch.zeros(9, 3),
        }

    def pipeline(self) -> tuple[Any, dict[str, Any]]:
        pipe = OvisImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=None,
            text_encoder=None,
            tokenizer=None,
            transformer=self.model().eval(),
        )
        embeds = torch.randn(2, 1, 9, 16)
        return pipe, {
            "prompt_embeds": embeds[0],
            "negative_prompt": None,  # "" by default, which does not go with embeddings
            "negative_prompt_embeds": embeds[1],
            "guidance_scale": 3.0,
            **SIZE,
        }
