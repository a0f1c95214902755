"""Image families: every behaviour of the mixin on a tiny random transformer of each class."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
)

from tests.families.mixin import FamilyMixin


def tiny_vae(channels: int = 4) -> AutoencoderKL:
    """A random autoencoder with the usual spatial factor of 8; runs stop at the latents, so it only tells sizes."""
    blocks = 4
    return AutoencoderKL(
        block_out_channels=(4,) * blocks,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        latent_channels=channels,
        norm_num_groups=1,
        layers_per_block=1,
    )


class TestPixArt(FamilyMixin):
    kinds = ("image",)
    grid = (1, 16, 16)
    sockets = 2
    untouched = ("attn2",)

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
            "hidden_states": torch.randn(2, 4, 32, 32),
            "encoder_hidden_states": torch.randn(2, 7, 16),
            "encoder_attention_mask": torch.ones(2, 7),
            "timestep": torch.tensor([500, 500]),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        }

    def pipeline(self) -> tuple[Any, dict[str, Any]]:
        pipe = PixArtSigmaPipeline(
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
            "height": 256,
            "width": 256,
            "use_resolution_binning": False,
        }


class TestFlux(FamilyMixin):
    kinds = ("text", "image")
    grid = (1, 16, 16)
    text_args = ("encoder_hidden_states",)
    sockets = 3

    def model(self) -> torch.nn.Module:
        return FluxTransformer2DModel(
            patch_size=1,
            in_channels=4,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            axes_dims_rope=(4, 4, 8),
        )

    def inputs(self) -> dict[str, Any]:
        rows, columns = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
        return {
            "hidden_states": torch.randn(2, 256, 4),
            "encoder_hidden_states": torch.randn(2, 10, 32),
            "pooled_projections": torch.randn(2, 32),
            "timestep": torch.tensor([0.5, 0.5]),
            "img_ids": torch.stack([torch.zeros(256), rows.flatten(), columns.flatten()], -1),
            "txt_ids": torch.zeros(10, 3),
        }

    def poke_token(self, inputs: dict[str, Any], at: tuple[int, int, int]) -> None:
        inputs["hidden_states"][:, at[1] * 16 + at[2]] += 1.0
