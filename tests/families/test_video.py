"""Video families: every behaviour of the mixin on a tiny random transformer of each class."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel

from tests.families.mixin import FamilyMixin


class TestWan(FamilyMixin):
    kinds = ("video",)
    grid = (4, 8, 8)
    probe = (2, 3, 5)
    sockets = 2
    untouched = ("attn2",)

    def model(self) -> torch.nn.Module:
        return WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=16,
            freq_dim=32,
            ffn_dim=32,
            num_layers=2,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
            rope_max_seq_len=32,
        )

    def inputs(self) -> dict[str, Any]:
        return {
            "hidden_states": torch.randn(2, 4, 4, 16, 16),
            "encoder_hidden_states": torch.randn(2, 7, 16),
            "timestep": torch.tensor([500, 500]),
        }

    def pipeline(self) -> tuple[Any, dict[str, Any]]:
        vae = AutoencoderKLWan(
            base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
        )
        pipe = WanPipeline(
            tokenizer=None,
            text_encoder=None,
            vae=vae,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            transformer=self.model().eval(),
        )
        embeds = torch.randn(2, 1, 7, 16)
        size = {"height": 128, "width": 128, "num_frames": 13}
        return pipe, {"prompt_embeds": embeds[0], "negative_prompt_embeds": embeds[1], "guidance_scale": 3.0, **size}
