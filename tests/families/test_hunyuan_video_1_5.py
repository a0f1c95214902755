"""HunyuanVideo 1.5: text of two encoders and an image behind the video."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo15,
    ClassifierFreeGuidance,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
)

from tests._support.family_cases import VideoCase

SIZES = (("", 9), ("_2", 5))  # text tokens of HunyuanVideo 1.5's two encoders


class TestHunyuanVideo15(VideoCase):
    # Its text is reordered before the first layer (valid tokens of three encoders first): no text_args.
    kinds = ("video", "text")
    untouched = ("context_embedder",)

    def model(self) -> torch.nn.Module:
        return HunyuanVideo15Transformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=2,
            num_refiner_layers=1,
            text_embed_dim=16,
            text_embed_2_dim=8,
            image_embed_dim=8,
            rope_axes_dim=(4, 4, 8),
            target_size=16,
            task_type="t2v",
        )

    def inputs(self) -> dict[str, Any]:
        mask = torch.ones(2, 9)
        mask[1, 6:] = 0
        return {
            "hidden_states": torch.randn(2, 4, 4, 8, 10),
            "timestep": torch.tensor([500.0, 500.0]),
            "encoder_hidden_states": torch.randn(2, 9, 16),
            "encoder_attention_mask": mask,
            "encoder_hidden_states_2": torch.randn(2, 5, 8),
            "encoder_attention_mask_2": torch.ones(2, 5),
            "image_embeds": torch.zeros(2, 3, 8),
        }

    def pipeline(self) -> tuple[Any, dict[str, Any]]:
        # The pipeline joins conditioning latents and a mask to the channels: 4 + 4 + 1.
        config = {**dict(self.model().config), "in_channels": 9}
        pipe = HunyuanVideo15Pipeline(
            text_encoder=None,
            tokenizer=None,
            text_encoder_2=None,
            tokenizer_2=None,
            vae=AutoencoderKLHunyuanVideo15(latent_channels=4, block_out_channels=(8, 8, 8, 8, 8), layers_per_block=1),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
            transformer=HunyuanVideo15Transformer3DModel.from_config(config).eval(),
            guider=ClassifierFreeGuidance(guidance_scale=3.0),
        )
        pipe.vision_num_semantic_tokens = 3
        embeds, embeds_2 = torch.randn(2, 1, 9, 16), torch.randn(2, 1, 5, 8)
        masks = {f"{sign}prompt_embeds_mask{n}": torch.ones(1, s) for sign in ("", "negative_") for n, s in SIZES}
        return pipe, {
            "prompt_embeds": embeds[0],
            "negative_prompt_embeds": embeds[1],
            "prompt_embeds_2": embeds_2[0],
            "negative_prompt_embeds_2": embeds_2[1],
            **masks,
            "height": 128,
            "width": 160,
            "num_frames": 13,
        }
