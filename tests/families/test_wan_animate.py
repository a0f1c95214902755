"""Wan 2.2 Animate: a reference frame before the video, poses and faces beside it."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanAnimatePipeline, WanAnimateTransformer3DModel
from PIL import Image

from tests._support.family_cases import VideoCase
from tests._support.wan import wan_vae


class TestWanAnimate(VideoCase):
    kinds = ("reference", "video")
    grid = (3, 8, 10)
    probe = (1, 3, 5)
    untouched = ("attn2", "face_adapter", "motion_encoder", "face_encoder")
    cross_sockets = 2

    def model(self) -> torch.nn.Module:
        return WanAnimateTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=12,
            latent_channels=4,
            out_channels=4,
            text_dim=16,
            freq_dim=32,
            ffn_dim=32,
            num_layers=2,
            image_dim=4,
            rope_max_seq_len=32,
            motion_encoder_channel_sizes={"4": 16, "8": 16, "16": 16},
            motion_encoder_size=16,
            motion_style_dim=8,
            motion_dim=4,
            motion_encoder_dim=16,
            face_encoder_hidden_dim=16,
            face_encoder_num_heads=2,
            inject_face_latents_blocks=2,
        )

    def inputs(self) -> dict[str, Any]:
        return {
            "hidden_states": torch.randn(2, 12, 4, 16, 20),
            "encoder_hidden_states": torch.randn(2, 7, 16),
            "timestep": torch.tensor([500, 500]),
            "pose_hidden_states": torch.randn(2, 4, 3, 16, 20),
            "face_pixel_values": torch.randn(2, 3, 9, 16, 16),
        }

    def poke_token(self, inputs: dict[str, Any], at: tuple[int, int, int]) -> None:
        t, y, x = at
        inputs["hidden_states"][:, :, 1 + t, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2] += 1.0

    def pipeline(self) -> tuple[Any, dict[str, Any]]:
        from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

        vision = CLIPVisionConfig(
            hidden_size=4, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=16
        )
        pipe = WanAnimatePipeline(
            tokenizer=None,
            text_encoder=None,
            vae=wan_vae(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
            image_processor=CLIPImageProcessor(size={"height": 32, "width": 32}, do_center_crop=False),
            image_encoder=CLIPVisionModel(vision).eval(),
            transformer=self.model().eval(),
        )
        embeds = torch.randn(2, 1, 7, 16)
        return pipe, {
            "image": Image.new("RGB", (80, 64), "red"),
            "pose_video": [Image.new("RGB", (80, 64), "green")] * 9,
            "face_video": [Image.new("RGB", (16, 16), "blue")] * 9,
            "prompt_embeds": embeds[0],
            "negative_prompt_embeds": embeds[1],
            "guidance_scale": 3.0,
            "height": 64,
            "width": 80,
            "segment_frame_length": 9,
        }
