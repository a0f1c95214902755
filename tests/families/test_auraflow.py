"""AuraFlow."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers import AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler

from tests._support.family_cases import HEIGHT, SIZE, WIDTH, ImageCase


def auraflow(model: torch.nn.Module, size: dict[str, int]) -> tuple[Any, dict[str, Any]]:
    """AuraFlow, both branches in one batch."""
    pipe = diffusers.AuraFlowPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        transformer=model,
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )
    embeds, mask = torch.randn(2, 1, 9, 16), torch.ones(1, 9)
    return pipe, {
        "prompt_embeds": embeds[0],
        "negative_prompt_embeds": embeds[1],
        "prompt_attention_mask": mask,
        "negative_prompt_attention_mask": mask,
        "guidance_scale": 3.0,
        **size,
    }


class TestAuraFlow(ImageCase):
    kinds = ("text", "image")
    text_args = ("encoder_hidden_states",)
    rotary = False

    def model(self) -> torch.nn.Module:
        return AuraFlowTransformer2DModel(
            sample_size=36,
            patch_size=2,
            in_channels=4,
            num_mmdit_layers=1,
            num_single_dit_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=16,
            caption_projection_dim=16,
            out_channels=4,
            pos_embed_max_size=576,
        )

    def inputs(self) -> dict[str, Any]:
        return {
            "hidden_states": torch.randn(2, 4, 2 * HEIGHT, 2 * WIDTH),
            "encoder_hidden_states": torch.randn(2, 9, 16),
            "timestep": torch.tensor([0.5, 0.5]),
        }

    def pipeline(self) -> tuple[Any, dict[str, Any]]:
        return auraflow(self.model().eval(), SIZE)
