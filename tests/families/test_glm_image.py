"""GLM-Image: text to picture, and pictures that are edited, whose keys come from a cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, GlmImagePipeline, GlmImageTransformer2DModel
from diffusers.models.transformers import transformer_glm_image

import dit_attn
from tests._support.family_cases import HEIGHT, SIZE, WIDTH, ImageCase
from tests._support.family_mixin import SPARSE


class TestGlmImage(ImageCase):
    kinds = ("text", "image")
    text_args = ("encoder_hidden_states",)

    def model(self) -> torch.nn.Module:
        return GlmImageTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            text_embed_dim=16,
            time_embed_dim=16,
            condition_dim=8,
            prior_vq_quantizer_codebook_size=32,
        )

    def inputs(self) -> dict[str, Any]:
        return {
            "hidden_states": torch.randn(2, 4, 2 * HEIGHT, 2 * WIDTH),
            "encoder_hidden_states": torch.randn(2, 9, 16),
            "prior_token_id": torch.randint(32, (2, HEIGHT * WIDTH)),
            "prior_token_drop": torch.zeros(2, HEIGHT * WIDTH, dtype=torch.bool),
            "timestep": torch.tensor([500, 500]),
            "target_size": torch.tensor([[256.0, 288.0]] * 2),
            "crop_coords": torch.zeros(2, 2),
        }

    def pipeline(self) -> tuple[Any, dict[str, Any]]:
        pipe = GlmImagePipeline(
            tokenizer=None,
            processor=None,
            text_encoder=None,
            vision_language_encoder=None,
            vae=None,
            transformer=self.model().eval(),
            scheduler=FlowMatchEulerDiscreteScheduler(),
        )
        embeds = torch.randn(2, 1, 9, 16)
        return pipe, {
            "prompt_embeds": embeds[0],
            "negative_prompt_embeds": embeds[1],
            "prior_token_ids": torch.randint(32, (1, HEIGHT * WIDTH)),
            "guidance_scale": 3.0,
            **SIZE,
        }

    def test_calls_that_write_or_read_the_cache_of_an_edited_picture_fall_back(self, net: Any, args: Any) -> None:
        one = {name: value[:1] for name, value in args.items()}
        picture = {**one, "encoder_hidden_states": one["encoder_hidden_states"][:, :0], "timestep": torch.zeros(1)}

        def edited() -> Iterator[torch.Tensor]:
            caches = transformer_glm_image.GlmImageKVCache(num_layers=2)
            for mode, given in (("write", picture), ("read", one)):
                caches.set_mode(mode)
                with torch.no_grad():
                    yield net(**given, kv_caches=caches, return_dict=False)[0]

        stock = list(edited())
        dit_attn.enable(net, SPARSE)
        for expected, found, reason in zip(stock, edited(), ("written to a cache", "cross attention"), strict=True):
            assert torch.equal(expected, found)
            ((given, count),) = dit_attn.summary(net).fallbacks.items()
            assert reason in given and count == dit_attn.summary(net).calls == 2
