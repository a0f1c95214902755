"""JoyImage-Edit: the model moves the item that is made in front of its references."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, JoyImageEditPipeline, JoyImageEditTransformer3DModel

from tests._support.family_cases import HEIGHT, SIZE, WIDTH, ImageCase


class TestJoyImageEdit(ImageCase):
    """A reference of the size of the picture, in front of it in the latents."""

    kinds: tuple[str, ...] = ("image", "reference", "text")
    text_args = ("encoder_hidden_states",)
    no_pipeline = "with a picture the pipeline asks its text encoder; the run of text to picture tests it"

    def model(self) -> torch.nn.Module:
        return JoyImageEditTransformer3DModel(
            in_channels=4, hidden_size=32, num_attention_heads=2, text_dim=16, num_layers=2, rope_dim_list=[4, 6, 6]
        )

    def inputs(self) -> dict[str, Any]:
        return {
            "hidden_states": torch.randn(2, 2, 4, 1, 2 * HEIGHT, 2 * WIDTH),
            "encoder_hidden_states": torch.randn(2, 9, 16),
            "timestep": torch.tensor([500, 500]),
        }

    def poke_token(self, inputs: dict[str, Any], at: tuple[int, int, int]) -> None:
        _, y, x = at
        inputs["hidden_states"][:, -1, :, :, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2] += 1.0


class TestJoyImage(TestJoyImageEdit):
    """Text to picture."""

    kinds = ("image", "text")
    no_pipeline = ""

    def inputs(self) -> dict[str, Any]:
        return {**super().inputs(), "hidden_states": torch.randn(2, 1, 4, 1, 2 * HEIGHT, 2 * WIDTH)}

    def pipeline(self) -> tuple[Any, dict[str, Any]]:
        pipe = JoyImageEditPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=None,
            text_encoder=None,
            tokenizer=None,
            processor=None,
            transformer=self.model().eval(),
        )
        pipe.vae_image_processor.get_default_height_width = lambda image, height, width: (height, width)  # else 1024
        embeds, mask = torch.randn(2, 1, 9, 16), torch.ones(1, 9, dtype=torch.long)
        return pipe, {
            "prompt_embeds": embeds[0],
            "prompt_embeds_mask": mask,
            "negative_prompt_embeds": embeds[1],
            "negative_prompt_embeds_mask": mask,
            "guidance_scale": 3.0,
            **SIZE,
        }
