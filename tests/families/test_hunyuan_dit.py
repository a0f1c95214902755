"""HunyuanDiT: the picture alone, with long skips between blocks."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import diffusers
import torch
from diffusers import HunyuanDiT2DModel

from tests._support.family_cases import HEIGHT, SIZE, WIDTH, ImageCase


def hunyuan_dit(model: torch.nn.Module, size: dict[str, int]) -> tuple[Any, dict[str, Any]]:
    """HunyuanDiT with its two text encoders, both branches in one batch."""
    pipe = diffusers.HunyuanDiTPipeline(
        vae=None,
        text_encoder=None,
        tokenizer=None,
        transformer=model,
        scheduler=diffusers.DDPMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        text_encoder_2=None,
        tokenizer_2=None,
    )
    embeds, mask = torch.randn(4, 1, 4, 16), torch.ones(1, 4)
    return pipe, {
        "prompt_embeds": embeds[0],
        "negative_prompt_embeds": embeds[1],
        "prompt_embeds_2": embeds[2],
        "negative_prompt_embeds_2": embeds[3],
        "prompt_attention_mask": mask,
        "negative_prompt_attention_mask": mask,
        "prompt_attention_mask_2": mask,
        "negative_prompt_attention_mask_2": mask,
        "guidance_scale": 3.0,
        "use_resolution_binning": False,
        **size,
    }


class TestHunyuanDiT(ImageCase):
    kinds = ("image",)
    untouched = ("attn2",)
    cross_sockets = 2
    cross_keys = MappingProxyType({"cross": 8})  # four of each encoder

    def model(self) -> torch.nn.Module:
        return HunyuanDiT2DModel(
            sample_size=36,
            num_layers=2,
            patch_size=2,
            attention_head_dim=8,
            num_attention_heads=2,
            in_channels=4,
            hidden_size=16,
            cross_attention_dim=16,
            cross_attention_dim_t5=16,
            pooled_projection_dim=16,
            text_len=4,
            text_len_t5=4,
            activation_fn="gelu-approximate",
        )

    def inputs(self) -> dict[str, Any]:
        from diffusers.models.embeddings import get_2d_rotary_pos_embed

        rotary = get_2d_rotary_pos_embed(8, ((0, 0), (HEIGHT, WIDTH)), (HEIGHT, WIDTH), output_type="pt")
        return {
            "hidden_states": torch.randn(2, 4, 2 * HEIGHT, 2 * WIDTH),
            "timestep": torch.tensor([500.0, 500.0]),
            "encoder_hidden_states": torch.randn(2, 4, 16),
            "text_embedding_mask": torch.ones(2, 4),
            "encoder_hidden_states_t5": torch.randn(2, 4, 16),
            "text_embedding_mask_t5": torch.ones(2, 4),
            "image_meta_size": torch.tensor([[512.0, 512, 512, 512, 0, 0]] * 2),
            "style": torch.zeros(2, dtype=torch.long),
            "image_rotary_emb": rotary,
        }

    def pipeline(self) -> tuple[Any, dict[str, Any]]:
        return hunyuan_dit(self.model().eval(), SIZE)
