"""Cosmos 1 and Predict 2.5."""

from __future__ import annotations

import inspect
from types import MappingProxyType
from typing import Any

import pytest
import torch
from diffusers import CosmosTextToWorldPipeline, CosmosTransformer3DModel, EDMEulerScheduler

from tests._support.family_cases import VideoCase


class NothingToCheck(torch.nn.Module):
    """Stands where the pipeline wants a safety checker: random weights, no prompt, and a run that stops at latents."""

    device, dtype = torch.device("cpu"), torch.float32

    def check_text_safety(self, prompt: str) -> bool:
        return True


class TestCosmos(VideoCase):
    kinds = ("video",)
    untouched = ("attn2",)
    cross_sockets = 2

    def model(self) -> torch.nn.Module:
        return CosmosTransformer3DModel(**self.settings())

    def settings(self) -> dict[str, Any]:
        return {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_layers": 2,
            "mlp_ratio": 2,
            "text_embed_dim": 16,
            "adaln_lora_dim": 4,
            "max_size": (4, 32, 32),
            "patch_size": (1, 2, 2),
            "rope_scale": (2.0, 1.0, 1.0),
            "concat_padding_mask": False,
        }

    def inputs(self) -> dict[str, Any]:
        return {
            "hidden_states": torch.randn(2, 4, 4, 16, 20),
            "timestep": torch.tensor([500.0, 500.0]),
            "encoder_hidden_states": torch.randn(2, 7, 16),
            "attention_mask": torch.ones(2, 7),
            "fps": 30,
        }

    def pipeline(self) -> tuple[Any, dict[str, Any]]:
        pipe = CosmosTextToWorldPipeline(
            text_encoder=None,
            tokenizer=None,
            transformer=self.model().eval(),
            vae=None,
            scheduler=EDMEulerScheduler(sigma_min=0.002, sigma_max=80, sigma_data=0.5, prediction_type="epsilon"),
            safety_checker=NothingToCheck(),
        )
        embeds = torch.randn(2, 1, 7, 16)
        return pipe, {
            "prompt_embeds": embeds[0],
            "negative_prompt_embeds": embeds[1],
            "guidance_scale": 3.0,
            "height": 128,
            "width": 160,
            "num_frames": 25,
        }


class TestCosmosPredict25(TestCosmos):
    """The 2.5 style: projected text, an image context in attn2, one timestep for every frame."""

    no_pipeline = "the first frame of Predict 2.5 needs a trained encoder; its loop is that of Cosmos 1"
    cross_calls = ("cross", "image")
    cross_keys = MappingProxyType({"cross": 7, "image": 5})

    def settings(self) -> dict[str, Any]:
        if "use_crossattn_projection" not in inspect.signature(CosmosTransformer3DModel.__init__).parameters:
            pytest.skip("this diffusers has no Cosmos Predict 2.5")
        text = {"use_crossattn_projection": True, "crossattn_proj_in_channels": 8, "encoder_hidden_states_channels": 16}
        image = {"img_context_dim_in": 6, "img_context_num_tokens": 5, "img_context_dim_out": 32}
        return {**super().settings(), "extra_pos_embed_type": None, **text, **image}

    def inputs(self) -> dict[str, Any]:
        times = torch.full((2, 1, 4, 1, 1), 0.6)
        times[:, :, 0] = 0.1
        context = (torch.randn(2, 7, 8), torch.randn(2, 5, 6))
        return {**super().inputs(), "encoder_hidden_states": context, "attention_mask": None, "timestep": times}
