"""PixArt-alpha and PixArt-Sigma."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtSigmaPipeline, PixArtTransformer2DModel

import dit_attn
from tests._support.family_cases import HEIGHT, WIDTH, ImageCase, tiny_vae
from tests._support.family_mixin import SPARSE


class TestPixArt(ImageCase):
    kinds = ("image",)
    untouched = ("attn2",)
    cross_sockets = 2
    rotary = False
    pipeline_class = PixArtSigmaPipeline

    def model(self) -> torch.nn.Module:
        return PixArtTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            cross_attention_dim=24,
            sample_size=32,
            patch_size=2,
            caption_channels=16,
            use_additional_conditions=False,
        )

    def inputs(self) -> dict[str, Any]:
        return {
            "hidden_states": torch.randn(2, 4, 2 * HEIGHT, 2 * WIDTH),
            "encoder_hidden_states": torch.randn(2, 7, 16),
            "encoder_attention_mask": torch.ones(2, 7),
            "timestep": torch.tensor([500, 500]),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        }

    def pipeline(self) -> tuple[Any, dict[str, Any]]:
        pipe = self.pipeline_class(
            tokenizer=None,
            text_encoder=None,
            vae=tiny_vae(),
            scheduler=DPMSolverMultistepScheduler(),
            transformer=self.model().eval(),
        )
        embeds, mask = torch.randn(2, 1, 7, 16), torch.ones(1, 7)
        return pipe, {
            "prompt_embeds": embeds[0],
            "negative_prompt_embeds": embeds[1],
            "prompt_attention_mask": mask,
            "negative_prompt_attention_mask": mask,
            "negative_prompt": None,
            "guidance_scale": 3.0,
            "height": 16 * HEIGHT,
            "width": 16 * WIDTH,
            "use_resolution_binning": False,
        }

    def test_unguided_batch_is_all_conditional(self) -> None:
        pipe, kwargs = self.pipeline()
        pipe.set_progress_bar_config(disable=True)
        dit_attn.enable(pipe, SPARSE)
        run = self._run(pipe, {**kwargs, "guidance_scale": 1.0, "num_images_per_prompt": 2}, 2)
        assert {call.branches for call in run.calls} == {("cond", "cond")}


class TestPixArtAlpha(TestPixArt):
    pipeline_class = PixArtAlphaPipeline
