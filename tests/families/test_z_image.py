"""Z-Image: picture and text each padded to whole blocks."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImageTransformer2DModel

from tests._support.family_cases import SIZE, ImageCase


def z_image(model: torch.nn.Module, size: dict[str, int]) -> tuple[Any, dict[str, Any]]:
    """Z-Image, both branches in one list, the prompt first."""
    pipe = diffusers.ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        transformer=model,
    )
    embeds = torch.randn(2, 9, 16)
    return pipe, {"prompt_embeds": [embeds[0]], "negative_prompt_embeds": [embeds[1]], "guidance_scale": 3.0, **size}


class TestZImage(ImageCase):
    kinds = ("image", "padding", "text")
    grid = (1, 15, 18)
    untouched = ("refiner",)
    refined = True

    def model(self) -> torch.nn.Module:
        model = ZImageTransformer2DModel(
            in_channels=4,
            dim=32,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=16,
            axes_dims=[8, 4, 4],
            axes_lens=[256, 32, 32],
        )
        for name in ("x_pad_token", "cap_pad_token"):  # the lowest diffusers leaves them as memory has them
            torch.nn.init.normal_(getattr(model, name), std=0.02)
        return model

    def inputs(self) -> dict[str, Any]:
        return {
            "x": [torch.randn(4, 1, 30, 36) for _ in range(2)],
            "t": torch.tensor([0.5, 0.5]),
            "cap_feats": [torch.randn(9, 16), torch.randn(9, 16)],
        }

    def poke_token(self, inputs: dict[str, Any], at: tuple[int, int, int]) -> None:
        _, y, x = at
        for latents in inputs["x"]:
            latents[:, :, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2] += 1.0

    def pipeline(self) -> tuple[Any, dict[str, Any]]:
        return z_image(self.model().eval(), {**SIZE, "height": 16 * 15})


def test_z_image_with_references_is_declined_by_layout() -> None:
    from dit_attn.processors.attach.families.image import _z_image

    with pytest.raises(ValueError, match="reference images"):
        _z_image(None, {"x": [[torch.zeros(4, 1, 8, 8)]], "patch_size": 2, "f_patch_size": 1})
