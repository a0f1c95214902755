"""Stable Diffusion 3 and 3.5, medium with its second attention."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

from tests._support.family_cases import HEIGHT, WIDTH, ImageCase, tiny_vae


class TestSD3(ImageCase):
    kinds = ("image", "text")
    text_args = ("encoder_hidden_states",)
    rotary = False

    def model(self) -> torch.nn.Module:
        return SD3Transformer2DModel(**self.settings())

    def settings(self) -> dict[str, Any]:
        return {
            "sample_size": 36,
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": 16,
            "caption_projection_dim": 16,
            "pooled_projection_dim": 16,
            "pos_embed_max_size": 24,
        }

    def inputs(self) -> dict[str, Any]:
        return {
            "hidden_states": torch.randn(2, 4, 2 * HEIGHT, 2 * WIDTH),
            "encoder_hidden_states": torch.randn(2, 9, 16),
            "pooled_projections": torch.randn(2, 16),
            "timestep": torch.tensor([500, 500]),
        }

    def pipeline(self) -> tuple[Any, dict[str, Any]]:
        pipe = StableDiffusion3Pipeline(
            transformer=self.model().eval(),
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=tiny_vae(),
            text_encoder=None,
            tokenizer=None,
            text_encoder_2=None,
            tokenizer_2=None,
            text_encoder_3=None,
            tokenizer_3=None,
        )
        embeds, pooled = torch.randn(2, 1, 9, 16), torch.randn(2, 1, 16)
        return pipe, {
            "prompt_embeds": embeds[0],
            "pooled_prompt_embeds": pooled[0],
            "negative_prompt_embeds": embeds[1],
            "negative_pooled_prompt_embeds": pooled[1],
            "guidance_scale": 3.0,
            "height": 16 * HEIGHT,
            "width": 16 * WIDTH,
        }


class TestSD35Medium(TestSD3):
    """3.5 medium: normalised queries and keys, and a second attention over the image alone."""

    sockets = 3

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "dual_attention_layers": (0,), "qk_norm": "rms_norm"}
