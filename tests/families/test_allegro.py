"""Allegro: the video alone, text in cross attention."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AllegroPipeline, AllegroTransformer3DModel, AutoencoderKLAllegro, EulerAncestralDiscreteScheduler

from tests._support.family_cases import VideoCase


class TestAllegro(VideoCase):
    kinds = ("video",)
    untouched = ("attn2",)
    cross_sockets = 2

    def model(self) -> torch.nn.Module:
        return AllegroTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            cross_attention_dim=24,
            sample_width=20,
            sample_height=16,
            sample_frames=4,
            caption_channels=16,
        )

    def inputs(self) -> dict[str, Any]:
        from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro

        freqs_t, freqs_h, freqs_w, grid_t, grid_h, grid_w = get_3d_rotary_pos_embed_allegro(
            embed_dim=12,
            crops_coords=((0, 0), (8, 10)),
            grid_size=(8, 10),
            temporal_size=4,
            interpolation_scale=(1.0, 1.0, 1.0),
        )
        rotary = (freqs_t, freqs_h, freqs_w)
        grid = tuple(torch.cartesian_prod(grid_t.long(), grid_h.long(), grid_w.long()).T[:, None].contiguous())
        return {
            "hidden_states": torch.randn(2, 4, 4, 16, 20),
            "encoder_hidden_states": torch.randn(2, 1, 7, 16),
            "timestep": torch.tensor([500, 500]),
            "attention_mask": torch.ones(2, 4, 16, 20),
            "encoder_attention_mask": torch.ones(2, 1, 7),
            "image_rotary_emb": (rotary, grid),
        }

    def pipeline(self) -> tuple[Any, dict[str, Any]]:
        pipe = AllegroPipeline(
            tokenizer=None,
            text_encoder=None,
            vae=AutoencoderKLAllegro(
                block_out_channels=(4, 4, 4, 4), latent_channels=4, layers_per_block=1, norm_num_groups=2
            ),
            scheduler=EulerAncestralDiscreteScheduler(),
            transformer=self.model().eval(),
        )
        embeds, mask = torch.randn(2, 1, 7, 16), torch.ones(1, 7)
        return pipe, {
            "prompt_embeds": embeds[0],
            "negative_prompt": None,
            "negative_prompt_embeds": embeds[1],
            "prompt_attention_mask": mask,
            "negative_prompt_attention_mask": mask,
            "guidance_scale": 3.0,
            "height": 128,
            "width": 160,
            "num_frames": 16,
        }
