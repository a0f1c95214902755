"""Krea 2: text of a fixed length with its padding inside it, one transformer call per branch."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Krea2Pipeline, Krea2Transformer2DModel

from tests._support.family_cases import HEIGHT, SIZE, WIDTH, PackedCase, image_ids


class TestKrea2(PackedCase):
    kinds = ("text", "image")
    text_args = ("encoder_hidden_states",)
    untouched = ("text_fusion",)

    def model(self) -> torch.nn.Module:
        return Krea2Transformer2DModel(
            in_channels=16,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=64,
            timestep_embed_dim=16,
            text_hidden_dim=32,
            num_text_layers=3,
            text_num_attention_heads=2,
            text_num_key_value_heads=2,
            text_intermediate_size=32,
            num_layerwise_text_blocks=1,
            num_refiner_text_blocks=1,
            axes_dims_rope=(4, 6, 6),
        )

    def inputs(self) -> dict[str, Any]:
        mask = torch.ones(2, 9, dtype=torch.bool)
        mask[1, 4:7] = False
        return {
            "hidden_states": torch.randn(2, HEIGHT * WIDTH, 16),
            "encoder_hidden_states": torch.randn(2, 9, 3, 32),
            "timestep": torch.tensor([0.5, 0.5]),
            "position_ids": torch.cat([torch.zeros(9, 3), image_ids()]),
            "encoder_attention_mask": mask,
        }

    def pipeline(self) -> tuple[Any, dict[str, Any]]:
        pipe = Krea2Pipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=None,
            text_encoder=None,
            tokenizer=None,
            transformer=self.model().eval(),
        )
        embeds, masks = torch.randn(2, 1, 9, 3, 32), torch.ones(2, 1, 9, dtype=torch.bool)
        masks[1, :, 3:7] = False
        return pipe, {
            "prompt_embeds": embeds[0],
            "prompt_embeds_mask": masks[0],
            "negative_prompt_embeds": embeds[1],
            "negative_prompt_embeds_mask": masks[1],
            "guidance_scale": 2.0,
            **SIZE,
        }
