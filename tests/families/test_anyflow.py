"""AnyFlow: a flow map, with frames before channels."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AnyFlowPipeline, AnyFlowTransformer3DModel, FlowMapEulerDiscreteScheduler

from tests._support.family_cases import VideoCase


class TestAnyFlow(VideoCase):
    kinds = ("video",)
    untouched = ("attn2",)
    cross_sockets = 2

    def model(self) -> torch.nn.Module:
        return AnyFlowTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            text_dim=16,
            freq_dim=16,
            ffn_dim=32,
            num_layers=2,
        )

    def inputs(self) -> dict[str, Any]:
        return {
            "hidden_states": torch.randn(2, 4, 4, 16, 20),
            "encoder_hidden_states": torch.randn(2, 7, 16),
            "timestep": torch.full((2, 4), 500.0),
            "r_timestep": torch.full((2, 4), 250.0),
        }

    def poke_token(self, inputs: dict[str, Any], at: tuple[int, int, int]) -> None:
        t, y, x = at
        inputs["hidden_states"][:, t, :, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2] += 1.0

    def pipeline(self) -> tuple[Any, dict[str, Any]]:
        pipe = AnyFlowPipeline(
            tokenizer=None,
            text_encoder=None,
            vae=None,
            transformer=self.model().eval(),
            scheduler=FlowMapEulerDiscreteScheduler(),
        )
        embeds = torch.randn(2, 1, 7, 16)
        return pipe, {
            "prompt_embeds": embeds[0],
            "negative_prompt_embeds": embeds[1],
            "guidance_scale": 3.0,
            "height": 128,
            "width": 160,
            "num_frames": 13,
        }
