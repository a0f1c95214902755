"""Nucleus-MoE-Image: the image attends to itself and the text behind it; experts choose their tokens."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, NucleusMoEImagePipeline, NucleusMoEImageTransformer2DModel

import dit_attn
from tests._support.family_cases import HEIGHT, SIZE, WIDTH, PackedCase
from tests._support.recorded_calls import watching


class TestNucleusImage(PackedCase):
    kinds = ("image", "text")
    text_args = ("encoder_hidden_states",)

    def model(self) -> torch.nn.Module:
        model = NucleusMoEImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=4,
            num_key_value_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(4, 4, 8),
            dense_moe_strategy="leave_first_block_dense",
            num_experts=4,
            moe_intermediate_dim=16,
            capacity_factors=[2.0, 2.0],
        )
        for name, parameter in model.named_parameters():
            if name.endswith(("gate_up_proj", "down_proj")):  # not initialized
                torch.nn.init.normal_(parameter, std=0.02)
        return model

    def inputs(self) -> dict[str, Any]:
        mask = torch.ones(2, 10, dtype=torch.bool)
        mask[1, 6:] = False
        return {
            "hidden_states": torch.randn(2, HEIGHT * WIDTH, 16),
            "img_shapes": [(1, HEIGHT, WIDTH)] * 2,
            "encoder_hidden_states": torch.randn(2, 10, 16),
            "encoder_hidden_states_mask": mask,
            "timestep": torch.tensor([0.5, 0.5]),
        }

    def pipeline(self) -> tuple[Any, dict[str, Any]]:
        pipe = NucleusMoEImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=None,
            text_encoder=None,
            processor=None,
            transformer=self.model().eval(),
        )
        embeds, mask = torch.randn(2, 1, 10, 16), torch.ones(1, 10, dtype=torch.bool)
        return pipe, {
            "prompt_embeds": embeds[0],
            "negative_prompt_embeds": embeds[1],
            "prompt_embeds_mask": mask,
            "negative_prompt_embeds_mask": mask,
            "guidance_scale": 3.0,
            **SIZE,
        }

    def test_the_queries_are_the_image_and_the_keys_the_text_too(self, net: Any, args: Any) -> None:
        dit_attn.enable(net)
        with watching() as seen:
            self.call(net, args)
        assert {(call.q.shape[1], call.k.shape[1], call.out.shape[1]) for call in seen} == {(288, 298, 288)}
