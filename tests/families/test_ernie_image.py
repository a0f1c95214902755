"""ERNIE-Image: the picture before the text, which is padded to the longest."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ErnieImagePipeline, ErnieImageTransformer2DModel, FlowMatchEulerDiscreteScheduler

from tests._support.family_cases import HEIGHT, SIZE, WIDTH, ImageCase
from tests._support.pipeline_runs import fill


class TestErnieImage(ImageCase):
    kinds = ("image", "text")
    text_args = ("text_bth",)

    def model(self) -> torch.nn.Module:
        model = ErnieImageTransformer2DModel(
            hidden_size=32,
            num_attention_heads=2,
            num_layers=2,
            ffn_hidden_size=64,
            in_channels=16,
            out_channels=16,
            text_in_dim=16,
            rope_axes_dim=(4, 6, 6),
        )
        return fill(model)

    def inputs(self) -> dict[str, Any]:
        return {
            "hidden_states": torch.randn(2, 16, HEIGHT, WIDTH),
            "timestep": torch.tensor([500.0, 500.0]),
            "text_bth": torch.randn(2, 9, 16),
            "text_lens": torch.tensor([9, 5]),
        }

    def pipeline(self) -> tuple[Any, dict[str, Any]]:
        pipe = ErnieImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=None,
            text_encoder=None,
            tokenizer=None,
            transformer=self.model().eval(),
        )
        return pipe, {
            "prompt_embeds": [torch.randn(9, 16)],
            "negative_prompt_embeds": [torch.randn(5, 16)],
            "guidance_scale": 3.0,
            **SIZE,
        }
