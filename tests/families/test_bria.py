"""Bria 3.2."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import BriaPipeline, BriaTransformer2DModel, FlowMatchEulerDiscreteScheduler

import dit_attn
from tests._support.family_cases import HEIGHT, SIZE, WIDTH, PackedCase, image_ids, tiny_vae
from tests._support.pipeline_runs import real, run


class TestBria(PackedCase):
    kinds = ("text", "image")
    text_args = ("encoder_hidden_states",)

    def model(self) -> torch.nn.Module:
        return BriaTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=[0, 8, 8],
        )

    def inputs(self) -> dict[str, Any]:
        return {
            "hidden_states": torch.randn(2, HEIGHT * WIDTH, 16),
            "encoder_hidden_states": torch.randn(2, 9, 16),
            "timestep": torch.tensor([500.0, 500.0]),
            "img_ids": image_ids(),
            "txt_ids": torch.zeros(9, 3),
        }

    def pipeline(self) -> tuple[Any, dict[str, Any]]:
        pipe = BriaPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            vae=tiny_vae(),
            text_encoder=None,
            tokenizer=None,
            transformer=self.model().eval(),
        )
        embeds = torch.randn(2, 1, 9, 16)
        return pipe, {
            "prompt_embeds": embeds[0],
            "negative_prompt_embeds": embeds[1],
            "guidance_scale": 3.0,
            **SIZE,
        }


def test_a_prediction_that_is_clipped_is_not_divided_by_the_scale() -> None:
    pipe, kwargs = real(TestBria)
    dit_attn.enable(pipe, dit_attn.SoftPAG(heads="0:0", inject="cond"))
    with pytest.raises(dit_attn.DitAttnError, match=r"clip_value.*use inject='shift'"):
        run(pipe, kwargs, 2, clip_value=0.5)
