"""Lumina-Image 2.0: text before the picture, refined before they meet."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Pipeline, Lumina2Transformer2DModel

import dit_attn
from tests._support.family_cases import HEIGHT, WIDTH, ImageCase, tiny_vae
from tests._support.family_mixin import SPARSE


class TestLumina2(ImageCase):
    kinds = ("text", "image")
    untouched = ("refiner",)
    refined = True

    def model(self) -> torch.nn.Module:
        return Lumina2Transformer2DModel(
            sample_size=36,
            patch_size=2,
            in_channels=4,
            hidden_size=24,
            num_layers=2,
            num_refiner_layers=1,
            num_attention_heads=4,
            num_kv_heads=2,
            multiple_of=2,
            axes_dim_rope=(2, 2, 2),
            axes_lens=(64, 64, 64),
            cap_feat_dim=16,
        )

    def inputs(self) -> dict[str, Any]:
        mask = torch.ones(2, 10, dtype=torch.long)
        mask[:, 7:] = 0
        return {
            "hidden_states": torch.randn(2, 4, 2 * HEIGHT, 2 * WIDTH),
            "timestep": torch.tensor([0.5, 0.5]),
            "encoder_hidden_states": torch.randn(2, 10, 16),
            "encoder_attention_mask": mask,
        }

    def test_captions_of_different_lengths_are_declined(self, net: Any, args: Any) -> None:
        args["encoder_attention_mask"][1, 5:] = 0
        stock = self.call(net, args)
        dit_attn.enable(net, SPARSE)
        assert torch.equal(stock[0], self.call(net, args)[0])
        assert "different lengths" in next(iter(dit_attn.summary(net).fallbacks))

    def pipeline(self) -> tuple[Any, dict[str, Any]]:
        pipe = Lumina2Pipeline(
            transformer=self.model().eval(),
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=tiny_vae(),
            text_encoder=None,
            tokenizer=None,
        )
        embeds, mask = torch.randn(2, 1, 10, 16), torch.ones(1, 10, dtype=torch.long)
        return pipe, {
            "prompt_embeds": embeds[0],
            "negative_prompt_embeds": embeds[1],
            "prompt_attention_mask": mask,
            "negative_prompt_attention_mask": mask,
            "guidance_scale": 3.0,
            "height": 16 * HEIGHT,
            "width": 16 * WIDTH,
        }
