"""GLM-Image: text to picture, and pictures that are edited, whose keys come from a cache."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, GlmImagePipeline, GlmImageTransformer2DModel
from PIL import Image

import dit_attn
from tests._support.family_cases import HEIGHT, SIZE, WIDTH, ImageCase, inner_class, tiny_vae
from tests._support.family_mixin import SPARSE
from tests._support.outputs import same


class TestGlmImage(ImageCase):
    kinds: tuple[str, ...] = ("text", "image")
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


class TestGlmImageEdit(TestGlmImage):
    """The branch with the prompt attends to the keys of the images that are edited."""

    kinds = ("condition", "text", "image")
    no_pipeline = "TestGlmImage runs the loop, and a test below the pass that writes the keys"

    def inputs(self) -> dict[str, Any]:
        caches = inner_class("transformer_glm_image.GlmImageKVCache")(num_layers=2)
        for layer in caches.caches:
            layer.store(*torch.randn(2, 1, 40, 2, 16))
        caches.set_mode("read")
        return {**super().inputs(), "kv_caches": caches}


def test_an_edit_writes_its_images_keys_before_the_first_step() -> None:
    torch.manual_seed(0)
    case = TestGlmImage()
    pipe, request = case.made()
    pipe.vae = tiny_vae()
    pipe.vae.register_to_config(latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    picture = torch.randint(32, (4 * 6,))
    request |= {
        "image": [[Image.new("RGB", (96, 64), "red")]],
        "prior_token_image_ids": [picture],
        "source_image_grid_thw": [torch.tensor([[1, 4, 6]])],
    }
    stock = case._run(pipe, request, 2)
    session = dit_attn.enable(pipe)
    assert same(stock.output, case._run(pipe, request, 2).output)
    session = dit_attn.enable(pipe, SPARSE, dit_attn.SoftPAG(heads="0:0", u=1.0, scale=1.0))
    calls = [call for call in case._run(pipe, request, 2).calls if call.tokens is not None]
    plain = [call for call in calls if "perturbed" not in call.branches and call.layer == calls[0].layer]
    assert [(call.step, call.branches[0], call.k.shape[1]) for call in plain] == [
        (0, "cond", 24 + 9 + 288),
        (0, "uncond", 9 + 288),
        (1, "cond", 24 + 9 + 288),
        (1, "uncond", 9 + 288),
    ]
    summary = dit_attn.summary(pipe)
    assert session.clock.total == 2 and session.guider.evaluations == 2
    assert summary.calls - summary.sparse_calls == sum(summary.fallbacks.values())
