"""HunyuanImage 2.1."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, HunyuanImageTransformer2DModel

from tests._support.family_cases import HEIGHT, WIDTH, ImageCase


def hunyuan_image(model: torch.nn.Module, size: dict[str, int]) -> tuple[Any, dict[str, Any]]:
    """HunyuanImage 2.1 under its guider, one transformer call per branch."""
    from diffusers.guiders import ClassifierFreeGuidance

    pipe = diffusers.HunyuanImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=model,
        guider=ClassifierFreeGuidance(guidance_scale=3.0),
    )
    embeds, mask = torch.randn(4, 1, 9, 16), torch.ones(1, 9, dtype=torch.long)
    return pipe, {
        "prompt_embeds": embeds[0],
        "negative_prompt_embeds": embeds[1],
        "prompt_embeds_2": embeds[2],
        "negative_prompt_embeds_2": embeds[3],
        "prompt_embeds_mask": mask,
        "negative_prompt_embeds_mask": mask,
        "prompt_embeds_mask_2": mask,
        "negative_prompt_embeds_mask_2": mask,
        **size,
    }


class TestHunyuanImage(ImageCase):
    kinds = ("image", "text")
    text_args = ("encoder_hidden_states",)
    sockets = 2
    untouched = ("context_embedder",)

    def model(self) -> torch.nn.Module:
        return HunyuanImageTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=1,
            num_single_layers=1,
            num_refiner_layers=1,
            patch_size=(1, 1),
            text_embed_dim=16,
            rope_axes_dim=(8, 8),
        )

    def inputs(self) -> dict[str, Any]:
        mask = torch.ones(2, 9)
        mask[1, 6:] = 0
        return {
            "hidden_states": torch.randn(2, 4, HEIGHT, WIDTH),
            "timestep": torch.tensor([500.0, 500.0]),
            "encoder_hidden_states": torch.randn(2, 9, 16),
            "encoder_attention_mask": mask,
        }

    def pipeline(self) -> tuple[Any, dict[str, Any]]:
        return hunyuan_image(self.model().eval(), {"height": 32 * HEIGHT, "width": 32 * WIDTH})
