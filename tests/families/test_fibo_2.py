"""Bria FIBO 2: the text becomes gist tokens, and an edit has the pictures that it starts from in the sequence."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import BriaFibo2Pipeline, BriaFibo2Transformer2DModel, FlowMatchEulerDiscreteScheduler

import dit_attn
from tests._support.family_cases import HEIGHT, SIZE, WIDTH, ImageCase
from tests._support.family_mixin import SPARSE


class TestFibo2(ImageCase):
    kinds: tuple[str, ...] = ("text", "image")
    untouched = ("noise_refiner", "perceiver", "cross_attention")
    refined = True

    def model(self) -> torch.nn.Module:
        return BriaFibo2Transformer2DModel(
            in_channels=4,
            dim=32,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            cap_feat_dim=16,
            injection_layer_ids=(1,),
            perceiver_num_layers=1,
            min_num_gist_tokens=8,
            max_num_gist_tokens=16,
            gist_step=4,
            gist_min_text_len=4,
            gist_max_text_len=32,
            axes_dims=(4, 6, 6),
            axes_lens=(64, 64, 64),
        )

    def inputs(self) -> dict[str, Any]:
        return {
            "hidden_states": torch.randn(2, 4, 2 * HEIGHT, 2 * WIDTH),
            "timestep": torch.tensor([0.5, 0.5]),
            "encoder_hidden_states": torch.randn(2, 2, 9, 16),
        }

    def pipeline(self) -> tuple[Any, dict[str, Any]]:
        pipe = BriaFibo2Pipeline(
            transformer=self.model().eval(),
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            vae=None,
            text_encoder=None,
            processor=None,
        )
        embeds = torch.randn(2, 1, 2, 9, 16)
        return pipe, {
            "prompt_embeds": embeds[0],
            "negative_prompt_embeds": embeds[1],
            "guidance_scale": 3.0,
            **SIZE,
        }


class TestFibo2Edit(TestFibo2):
    """A context picture stands behind the one that is made."""

    kinds = ("text", "image", "reference")
    no_pipeline = "with a picture the pipeline asks its text encoder; the run of text to picture tests it"

    def inputs(self) -> dict[str, Any]:
        return {**super().inputs(), "context_latents": [torch.randn(2, 4, 12, 18)]}

    def test_captions_of_different_lengths_are_declined(self, net: Any, args: Any) -> None:
        mask = torch.ones(2, 9, dtype=torch.bool)
        mask[1, 4:] = False  # fewer gist tokens, which moves all of them to the end
        args["encoder_attention_mask"] = mask
        stock = self.call(net, args)
        dit_attn.enable(net, SPARSE)
        assert torch.equal(stock[0], self.call(net, args)[0])
        assert "different lengths" in next(iter(dit_attn.summary(net).fallbacks))
