"""CogView3-Plus."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import CogVideoXDDIMScheduler, CogView3PlusPipeline, CogView3PlusTransformer2DModel

from tests._support.family_cases import HEIGHT, SIZE, WIDTH, ImageCase


class TestCogView3Plus(ImageCase):
    kinds = ("text", "image")
    text_args = ("encoder_hidden_states",)
    rotary = False

    def model(self) -> torch.nn.Module:
        return CogView3PlusTransformer2DModel(
            in_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            out_channels=4,
            text_embed_dim=16,
            time_embed_dim=16,
            condition_dim=8,
            pos_embed_max_size=64,
            sample_size=32,
        )

    def inputs(self) -> dict[str, Any]:
        size = torch.tensor([[256.0, 288.0]] * 2)
        return {
            "hidden_states": torch.randn(2, 4, 2 * HEIGHT, 2 * WIDTH),
            "encoder_hidden_states": torch.randn(2, 9, 16),
            "timestep": torch.tensor([500, 500]),
            "original_size": size,
            "target_size": size,
            "crop_coords": torch.zeros(2, 2),
        }

    def pipeline(self) -> tuple[Any, dict[str, Any]]:
        pipe = CogView3PlusPipeline(
            tokenizer=None,
            text_encoder=None,
            vae=None,
            transformer=self.model().eval(),
            scheduler=CogVideoXDDIMScheduler(),
        )
        # The pipeline drops negative_prompt_embeds: without a negative prompt its embeddings are zeros.
        return pipe, {"prompt_embeds": torch.randn(1, 9, 16), "guidance_scale": 3.0, **SIZE}
