"""HiDream-I1: pictures padded to the longest sequence of the model."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, HiDreamImageTransformer2DModel

from tests._support.family_cases import HEIGHT, WIDTH, ImageCase


def hidream(model: torch.nn.Module, size: dict[str, int]) -> tuple[Any, dict[str, Any]]:
    """HiDream-I1 with its two text streams and pooled vector, both branches in one batch."""
    parts = dict.fromkeys([f"{part}{n}" for part in ("text_encoder", "tokenizer") for n in ("", "_2", "_3", "_4")])
    pipe = diffusers.HiDreamImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=None, transformer=model, **parts
    )
    pipe.default_sample_size = 36  # it scales every picture to this area
    t5, llama, pooled = torch.randn(2, 1, 5, 8), torch.randn(2, 1, 1, 5, 8), torch.randn(2, 1, 16)
    return pipe, {
        "prompt_embeds_t5": t5[0],
        "negative_prompt_embeds_t5": t5[1],
        "prompt_embeds_llama3": llama[0],
        "negative_prompt_embeds_llama3": llama[1],
        "pooled_prompt_embeds": pooled[0],
        "negative_pooled_prompt_embeds": pooled[1],
        "guidance_scale": 3.0,
        **size,
    }


class TestHiDream(ImageCase):
    """A picture that is not square is padded to the longest sequence of the model."""

    kinds = ("image", "padding", "text")

    def model(self) -> torch.nn.Module:
        return HiDreamImageTransformer2DModel(
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            caption_channels=[8, 8],
            text_emb_dim=16,
            num_routed_experts=2,
            num_activated_experts=1,
            axes_dims_rope=(4, 4, 8),
            max_resolution=(36, 36),
            llama_layers=(0, 0),
            force_inference_output=True,
        )

    def inputs(self) -> dict[str, Any]:
        return {
            "hidden_states": torch.randn(2, 4, 2 * HEIGHT, 2 * WIDTH),
            "timesteps": torch.tensor([500.0, 500.0]),
            "encoder_hidden_states_t5": torch.randn(2, 5, 8),
            "encoder_hidden_states_llama3": torch.randn(1, 2, 5, 8),
            "pooled_embeds": torch.randn(2, 16),
        }

    def pipeline(self) -> tuple[Any, dict[str, Any]]:
        return hidream(self.model().eval(), {"height": 256, "width": 320})


class TestHiDreamSquare(TestHiDream):
    kinds = ("image", "text")
    grid = (1, 16, 16)

    def inputs(self) -> dict[str, Any]:
        return {**super().inputs(), "hidden_states": torch.randn(2, 4, 32, 32)}

    def pipeline(self) -> tuple[Any, dict[str, Any]]:
        return hidream(self.model().eval(), {"height": 256, "width": 256})
