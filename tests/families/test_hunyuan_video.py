"""HunyuanVideo: text joined behind the video, masks per key."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, HunyuanVideoPipeline, HunyuanVideoTransformer3DModel

from tests._support.family_cases import VideoCase
from tests._support.hunyuan_video import hunyuan_arguments, hunyuan_vae


class TestHunyuanVideo(VideoCase):
    kinds = ("video", "text")
    text_args = ("encoder_hidden_states",)
    sockets = 3
    untouched = ("context_embedder",)

    def model(self) -> torch.nn.Module:
        return HunyuanVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=10,
            num_layers=1,
            num_single_layers=2,
            num_refiner_layers=1,
            patch_size=2,
            patch_size_t=1,
            guidance_embeds=True,
            text_embed_dim=16,
            pooled_projection_dim=8,
            rope_axes_dim=(2, 4, 4),
        )

    def inputs(self) -> dict[str, Any]:
        mask = torch.ones(2, 12)
        mask[1, 7:] = 0
        return {
            "hidden_states": torch.randn(2, 4, 4, 16, 20),
            "timestep": torch.tensor([500, 500]),
            "encoder_hidden_states": torch.randn(2, 12, 16),
            "encoder_attention_mask": mask,
            "pooled_projections": torch.randn(2, 8),
            "guidance": torch.tensor([6000.0, 6000.0]),
        }

    def pipeline(self) -> tuple[Any, dict[str, Any]]:
        pipe = HunyuanVideoPipeline(
            text_encoder=None,
            tokenizer=None,
            text_encoder_2=None,
            tokenizer_2=None,
            vae=hunyuan_vae(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
            transformer=self.model().eval(),
        )
        return pipe, hunyuan_arguments()
