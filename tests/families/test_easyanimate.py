"""EasyAnimate 5.1: text and video in one sequence."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLMagvit,
    EasyAnimatePipeline,
    EasyAnimateTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
)

from tests._support.family_cases import VideoCase


class TestEasyAnimate(VideoCase):
    kinds = ("text", "video")
    text_args = ("encoder_hidden_states",)

    def model(self) -> torch.nn.Module:
        return EasyAnimateTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            patch_size=2,
            num_layers=2,
            mmdit_layers=2,
            time_embed_dim=8,
            text_embed_dim=16,
            sample_width=20,
            sample_height=16,
            time_position_encoding_type="3d_rope",
        )

    def inputs(self) -> dict[str, Any]:
        return {
            "hidden_states": torch.randn(2, 4, 4, 16, 20),
            "timestep": torch.tensor([500, 500]),
            "timestep_cond": None,
            "encoder_hidden_states": torch.randn(2, 7, 16),
        }

    def pipeline(self) -> tuple[Any, dict[str, Any]]:
        pipe = EasyAnimatePipeline(
            text_encoder=None,
            tokenizer=None,
            vae=AutoencoderKLMagvit(
                latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=2
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(),
            transformer=self.model().eval(),
        )
        embeds, mask = torch.randn(2, 1, 7, 16), torch.ones(1, 7)
        return pipe, {
            "prompt_embeds": embeds[0],
            "negative_prompt_embeds": embeds[1],
            "prompt_attention_mask": mask,
            "negative_prompt_attention_mask": mask,
            "guidance_scale": 3.0,
            "height": 128,
            "width": 160,
            "num_frames": 13,
        }
