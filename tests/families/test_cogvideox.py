"""CogVideoX 2b, 5b, 1.5 and ConsisID: text before the video in one sequence."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    ConsisIDTransformer3DModel,
)
from diffusers.models.embeddings import get_3d_rotary_pos_embed

from tests._support.family_cases import VideoCase


def rotary_tables(grid: tuple[int, int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The tables that the pipelines make for heads of 16 channels."""
    frames, *size = grid
    return get_3d_rotary_pos_embed(16, ((0, 0), tuple(size)), tuple(size), frames)


class TestCogVideoX2b(VideoCase):
    """The 2b style: absolute positions, no rotary embedding."""

    kinds = ("text", "video")
    text_args = ("encoder_hidden_states",)
    grid = (3, 10, 12)
    rotary = False

    def model(self) -> torch.nn.Module:
        return CogVideoXTransformer3DModel(**self.settings())

    def settings(self) -> dict[str, Any]:
        return {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "in_channels": 4,
            "out_channels": 4,
            "time_embed_dim": 8,
            "text_embed_dim": 16,
            "num_layers": 2,
            "sample_width": 24,
            "sample_height": 20,
            "sample_frames": 9,
            "patch_size": 2,
            "temporal_compression_ratio": 4,
            "max_text_seq_length": 8,
        }

    def inputs(self) -> dict[str, Any]:
        return {
            "hidden_states": torch.randn(2, 3, 4, 20, 24),
            "encoder_hidden_states": torch.randn(2, 8, 16),
            "timestep": torch.tensor([500, 500]),
        }

    def poke_token(self, inputs: dict[str, Any], at: tuple[int, int, int]) -> None:
        t, y, x = at
        inputs["hidden_states"][:, t, :, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2] += 1.0

    def pipeline(self) -> tuple[Any, dict[str, Any]]:
        vae = AutoencoderKLCogVideoX(
            down_block_types=("CogVideoXDownBlock3D",) * 4,
            up_block_types=("CogVideoXUpBlock3D",) * 4,
            block_out_channels=(8, 8, 8, 8),
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=2,
            temporal_compression_ratio=4,
        )
        pipe = CogVideoXPipeline(
            tokenizer=None,
            text_encoder=None,
            vae=vae,
            scheduler=CogVideoXDDIMScheduler(),
            transformer=self.model().eval(),
        )
        embeds = torch.randn(2, 1, 8, 16)
        size = {"height": 160, "width": 192, "num_frames": 9}
        return pipe, {
            "prompt_embeds": embeds[0],
            "negative_prompt_embeds": embeds[1],
            "guidance_scale": 3.0,
            "max_sequence_length": 8,
            **size,
        }


class TestCogVideoX5b(TestCogVideoX2b):
    """The 5b style: rotary embedding on the video part."""

    rotary = True

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "use_rotary_positional_embeddings": True}

    def inputs(self) -> dict[str, Any]:
        return {**super().inputs(), "image_rotary_emb": rotary_tables(self.grid)}


class TestCogVideoXPatchedTime(TestCogVideoX2b):
    """The 1.5 style: two latent frames per token."""

    grid = (2, 10, 14)
    rotary = True
    probe = (1, 3, 5)

    def settings(self) -> dict[str, Any]:
        size = {"sample_height": 28, "sample_width": 28}  # room for the picture turned round
        return {**super().settings(), **size, "patch_size_t": 2, "use_rotary_positional_embeddings": True}

    def inputs(self) -> dict[str, Any]:
        return {
            "hidden_states": torch.randn(2, 4, 4, 20, 28),
            "encoder_hidden_states": torch.randn(2, 8, 16),
            "timestep": torch.tensor([500, 500]),
            "image_rotary_emb": rotary_tables(self.grid),
        }

    def poke_token(self, inputs: dict[str, Any], at: tuple[int, int, int]) -> None:
        t, y, x = at
        inputs["hidden_states"][:, 2 * t : 2 * t + 2, :, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2] += 1.0

    def pipeline(self) -> tuple[Any, dict[str, Any]]:
        pipe, arguments = super().pipeline()
        return pipe, {**arguments, "width": 224, "num_frames": 13}


class TestConsisId(TestCogVideoX2b):
    """CogVideoX with cross attention to face features between the blocks."""

    untouched = ("perceiver_cross_attention", "local_facial_extractor")
    no_pipeline = "ConsisID's pipeline reads faces with OpenCV, which is not installed; its loop is CogVideoX's"

    def settings(self) -> dict[str, Any]:
        face = {"LFE_id_dim": 2, "LFE_vit_dim": 2, "LFE_dim_head": 8, "LFE_num_heads": 2, "LFE_num_id_token": 1}
        more = {"LFE_num_querie": 1, "LFE_output_dim": 21, "LFE_ff_mult": 1, "LFE_num_scale": 1}
        cross = {"cross_attn_interval": 1, "cross_attn_dim_head": 1, "cross_attn_num_heads": 1}
        return {**super().settings(), "is_train_face": True, **face, **more, **cross}

    def model(self) -> torch.nn.Module:
        return ConsisIDTransformer3DModel(**self.settings())

    def inputs(self) -> dict[str, Any]:
        return {**super().inputs(), "id_cond": torch.ones(2, 2), "id_vit_hidden": [torch.ones(2, 2, 2)]}
