"""Qwen-Image and Qwen-Image-Edit."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel
from packaging.version import Version

from tests._support.family_cases import HEIGHT, SIZE, WIDTH, PackedCase


def qwen_image(model: torch.nn.Module, size: dict[str, int]) -> tuple[Any, dict[str, Any]]:
    """Qwen-Image, one transformer call per branch; the negative prompt is the shorter one."""
    pipe = diffusers.QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        transformer=model,
    )
    embeds, masks = torch.randn(2, 1, 10, 16), torch.ones(2, 1, 10, dtype=torch.long)
    masks[1, :, 6:] = 0
    negative, negative_mask = embeds[1], masks[1]
    if Version(diffusers.__version__) < Version("0.37"):  # takes its rotary table from the mask's sum
        negative, negative_mask = negative[:, :6], negative_mask[:, :6]
    return pipe, {
        "prompt_embeds": embeds[0],
        "negative_prompt_embeds": negative,
        "prompt_embeds_mask": masks[0],
        "negative_prompt_embeds_mask": negative_mask,
        "true_cfg_scale": 3.0,
        **size,
    }


class TestQwenImage(PackedCase):
    kinds: tuple[str, ...] = ("text", "image")
    text_args = ("encoder_hidden_states",)

    def model(self) -> torch.nn.Module:
        return QwenImageTransformer2DModel(
            patch_size=2,
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            guidance_embeds=False,
            axes_dims_rope=(4, 4, 8),
        )

    def inputs(self) -> dict[str, Any]:
        mask = torch.ones(2, 10, dtype=torch.bool)
        mask[1, 6:] = False
        older = {"txt_seq_lens": [10, 10]} if Version(diffusers.__version__) < Version("0.37") else {}
        return {
            "hidden_states": torch.randn(2, HEIGHT * WIDTH, 16),
            "encoder_hidden_states": torch.randn(2, 10, 16),
            "encoder_hidden_states_mask": mask,
            "timestep": torch.tensor([0.5, 0.5]),
            "img_shapes": [[(1, HEIGHT, WIDTH)]] * 2,
            **older,
        }

    def pipeline(self) -> tuple[Any, dict[str, Any]]:
        return qwen_image(self.model().eval(), SIZE)


class TestQwenImageEdit(TestQwenImage):
    no_pipeline = "the pipeline scales a reference to a million pixels, too much for a test; its loop is Qwen-Image's"
    kinds = ("text", "image", "reference")

    def inputs(self) -> dict[str, Any]:
        return {
            **super().inputs(),
            "hidden_states": torch.randn(2, HEIGHT * WIDTH + 54, 16),
            "img_shapes": [[(1, HEIGHT, WIDTH), (1, 6, 9)]] * 2,
        }
