"""Chroma: Flux with guidance in two calls and a mask of the text."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers import ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler

from tests._support.family_cases import HEIGHT, SIZE, WIDTH, PackedCase, image_ids


def chroma(model: torch.nn.Module, size: dict[str, int]) -> tuple[Any, dict[str, Any]]:
    """Chroma, one transformer call per branch; the negative prompt is the shorter one."""
    pipe = diffusers.ChromaPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        transformer=model,
    )
    embeds, masks = torch.randn(2, 1, 10, 32), torch.ones(2, 1, 10, dtype=torch.bool)
    masks[1, :, 6:] = False
    return pipe, {
        "prompt_embeds": embeds[0],
        "negative_prompt_embeds": embeds[1],
        "prompt_attention_mask": masks[0],
        "negative_prompt_attention_mask": masks[1],
        "guidance_scale": 3.0,
        **size,
    }


class TestChroma(PackedCase):
    kinds = ("text", "image")
    text_args = ("encoder_hidden_states",)
    sockets = 3

    def model(self) -> torch.nn.Module:
        return ChromaTransformer2DModel(
            patch_size=1,
            in_channels=4,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            axes_dims_rope=(4, 4, 8),
            approximator_num_channels=8,
            approximator_hidden_dim=16,
            approximator_layers=1,
        )

    def inputs(self) -> dict[str, Any]:
        mask = torch.ones(2, 10 + HEIGHT * WIDTH, dtype=torch.bool)
        mask[1, 6:10] = False
        return {
            "hidden_states": torch.randn(2, HEIGHT * WIDTH, 4),
            "encoder_hidden_states": torch.randn(2, 10, 32),
            "timestep": torch.tensor([0.5, 0.5]),
            "img_ids": image_ids(),
            "txt_ids": torch.zeros(10, 3),
            "attention_mask": mask,
        }

    def pipeline(self) -> tuple[Any, dict[str, Any]]:
        return chroma(self.model().eval(), SIZE)
