"""Flux.2 dev, klein, and references."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Flux2Transformer2DModel
from PIL import Image

from tests._support.family_cases import HEIGHT, SIZE, WIDTH, PackedCase, image_ids, inner_class


def flux2_vae() -> diffusers.AutoencoderKLFlux2:
    """A random autoencoder with the usual spatial factor of 8."""
    return diffusers.AutoencoderKLFlux2(
        block_out_channels=(4,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=1,
        norm_num_groups=1,
        layers_per_block=1,
    )


def flux2(model: torch.nn.Module, size: dict[str, int]) -> tuple[Any, dict[str, Any]]:
    """Flux.2 dev: guidance is an input of the model, so there is one branch."""
    pipe = diffusers.Flux2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=flux2_vae(),
        text_encoder=None,
        tokenizer=None,
        transformer=model,
    )
    return pipe, {"prompt_embeds": torch.randn(1, 10, 32), "guidance_scale": 3.0, **size}


def flux2_klein(model: torch.nn.Module, size: dict[str, int]) -> tuple[Any, dict[str, Any]]:
    """Flux.2 klein, one transformer call per branch."""
    if not hasattr(diffusers, "Flux2KleinPipeline"):
        pytest.skip(f"diffusers {diffusers.__version__} has no pipeline of Flux.2 klein")
    pipe = diffusers.Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=flux2_vae(),  # the pipeline reads its statistics
        text_encoder=None,
        tokenizer=None,
        transformer=model,
    )
    embeds = torch.randn(2, 1, 10, 32)
    return pipe, {"prompt_embeds": embeds[0], "negative_prompt_embeds": embeds[1], "guidance_scale": 3.0, **size}


class TestFlux2(PackedCase):
    kinds: tuple[str, ...] = ("text", "image")
    text_args = ("encoder_hidden_states",)
    run_order: tuple[str, ...] = ("cond",)
    sockets = 3

    def model(self) -> torch.nn.Module:
        return Flux2Transformer2DModel(
            patch_size=1,
            in_channels=4,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            timestep_guidance_channels=16,
            axes_dims_rope=(4, 4, 4, 4),
        )

    def inputs(self) -> dict[str, Any]:
        return {
            "hidden_states": torch.randn(2, HEIGHT * WIDTH, 4),
            "encoder_hidden_states": torch.randn(2, 10, 32),
            "timestep": torch.tensor([0.5, 0.5]),
            "img_ids": image_ids(4),
            "txt_ids": torch.zeros(10, 4),
            "guidance": torch.tensor([4.0, 4.0]),
        }

    def pipeline(self) -> tuple[Any, dict[str, Any]]:
        return flux2(self.model().eval(), SIZE)


class TestFlux2WithReference(TestFlux2):
    kinds = ("text", "image", "reference")

    def inputs(self) -> dict[str, Any]:
        reference = image_ids(4, kind=10, height=6, width=9)
        return {
            **super().inputs(),
            "hidden_states": torch.randn(2, HEIGHT * WIDTH + 54, 4),
            "img_ids": torch.cat([image_ids(4), reference]),
        }

    def pipeline(self) -> tuple[Any, dict[str, Any]]:
        pipe, arguments = super().pipeline()
        return pipe, {**arguments, "image": [Image.new("RGB", (16 * 9, 16 * 6), "red")]}


class TestFlux2Klein(TestFlux2):
    """Klein has true guidance, dev has it as an input of the model."""

    run_order = ()

    def pipeline(self) -> tuple[Any, dict[str, Any]]:
        return flux2_klein(self.model().eval(), SIZE)


class TestFlux2KleinKV(TestFlux2):
    """Klein with a cache: the references attend to each other alone, in the first step, which keeps their keys."""

    kinds = ("text", "condition", "image")
    references = 54

    def model(self) -> torch.nn.Module:
        model = super().model()
        for block in model.transformer_blocks:
            block.attn.set_processor(inner_class("transformer_flux2.Flux2KVAttnProcessor")())
        for block in model.single_transformer_blocks:
            block.attn.set_processor(inner_class("transformer_flux2.Flux2KVParallelSelfAttnProcessor")())
        return model

    def inputs(self) -> dict[str, Any]:
        reference = image_ids(4, kind=10, height=6, width=9)
        return {
            **super().inputs(),
            "hidden_states": torch.randn(2, self.references + HEIGHT * WIDTH, 4),
            "img_ids": torch.cat([reference, image_ids(4)]),
            "num_ref_tokens": self.references,
            "kv_cache_mode": "extract",
        }

    def poke_token(self, inputs: dict[str, Any], at: tuple[int, int, int]) -> None:
        inputs["hidden_states"][:, self.references + at[1] * WIDTH + at[2]] += 1.0

    def pipeline(self) -> tuple[Any, dict[str, Any]]:
        pipe = diffusers.Flux2KleinKVPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=flux2_vae(),
            text_encoder=None,
            tokenizer=None,
            transformer=super().model().eval(),
        )
        image = [Image.new("RGB", (16 * 9, 16 * 6), "red")]
        return pipe, {"prompt_embeds": torch.randn(1, 10, 32), "image": image, **SIZE}


class TestFlux2KleinKVLaterSteps(TestFlux2KleinKV):
    """Later steps: the keys of the references come from the cache."""

    no_pipeline = "TestFlux2KleinKV runs the pipeline"

    def inputs(self) -> dict[str, Any]:
        cache = inner_class("transformer_flux2.Flux2KVCache")(1, 2)
        cache.num_ref_tokens = self.references
        for layer in (*cache.double_block_caches, *cache.single_block_caches):
            layer.store(*torch.randn(2, 2, self.references, 2, 16))
        return {**super(TestFlux2KleinKV, self).inputs(), "kv_cache": cache, "kv_cache_mode": "cached"}

    def poke_token(self, inputs: dict[str, Any], at: tuple[int, int, int]) -> None:
        PackedCase.poke_token(self, inputs, at)
