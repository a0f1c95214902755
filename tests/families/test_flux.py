"""Flux.1, with the reference of Kontext."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxKontextPipeline, FluxPipeline, FluxTransformer2DModel

from tests._support.family_cases import HEIGHT, WIDTH, PackedCase, image_ids, tiny_vae


class TestFlux(PackedCase):
    kinds: tuple[str, ...] = ("text", "image")
    text_args = ("encoder_hidden_states",)
    sockets = 3

    def model(self) -> torch.nn.Module:
        return FluxTransformer2DModel(
            patch_size=1,
            in_channels=4,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            axes_dims_rope=(4, 4, 8),
        )

    def inputs(self) -> dict[str, Any]:
        return {
            "hidden_states": torch.randn(2, HEIGHT * WIDTH, 4),
            "encoder_hidden_states": torch.randn(2, 10, 32),
            "pooled_projections": torch.randn(2, 32),
            "timestep": torch.tensor([0.5, 0.5]),
            "img_ids": image_ids(),
            "txt_ids": torch.zeros(10, 3),
        }

    def pipeline(self) -> tuple[Any, dict[str, Any]]:
        pipe = FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=tiny_vae(1),
            text_encoder=None,
            tokenizer=None,
            text_encoder_2=None,
            tokenizer_2=None,
            transformer=self.model().eval(),
        )
        embeds, pooled = torch.randn(2, 1, 10, 32), torch.randn(2, 1, 32)
        return pipe, {
            "prompt_embeds": embeds[0],
            "pooled_prompt_embeds": pooled[0],
            "negative_prompt_embeds": embeds[1],
            "negative_pooled_prompt_embeds": pooled[1],
            "true_cfg_scale": 3.0,
            "height": 16 * HEIGHT,
            "width": 16 * WIDTH,
        }


class TestFluxKontext(TestFlux):
    """A reference image stands behind the picture, with kind 1 in the table of positions."""

    kinds = ("text", "image", "reference")

    def inputs(self) -> dict[str, Any]:
        reference = image_ids(kind=1, height=6, width=9)
        return {
            **super().inputs(),
            "hidden_states": torch.randn(2, HEIGHT * WIDTH + 54, 4),
            "img_ids": torch.cat([image_ids(), reference]),
        }

    def pipeline(self) -> tuple[Any, dict[str, Any]]:
        stock, arguments = super().pipeline()
        pipe = FluxKontextPipeline(**stock.components)
        image = {"image": torch.rand(1, 3, 96, 144), "_auto_resize": False, "max_area": 16 * HEIGHT * 16 * WIDTH}
        return pipe, {**arguments, **image}
