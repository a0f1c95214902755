"""What Wan and its relatives share: a small configuration, its inputs, an autoencoder and the arguments of a run."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKLWan

from tests._support.family_cases import VideoCase

WAN = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 32,
    "ffn_dim": 32,
    "num_layers": 2,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 32,
}


def wan_vae() -> AutoencoderKLWan:
    """A random Wan autoencoder with one level fewer: a latent stands for 4 x 4 pixels, not 8 x 8.

    Most runs take only sizes from it. Image-to-video and Animate encode every frame, which is most of what they cost.
    """
    return AutoencoderKLWan(
        base_dim=3,
        z_dim=4,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        scale_factor_spatial=4,
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )


class WanLike(VideoCase):
    """The sequence is the video alone, text in cross attention."""

    kinds = ("video",)
    untouched = ("attn2",)
    cross_sockets = 2

    def inputs(self) -> dict[str, Any]:
        return {
            "hidden_states": torch.randn(2, 4, 4, 16, 20),
            "encoder_hidden_states": torch.randn(2, 7, 16),
            "timestep": torch.tensor([500, 500]),
        }

    def run_arguments(self) -> dict[str, Any]:
        embeds = torch.randn(2, 1, 7, 16)
        size = {"height": 64, "width": 80, "num_frames": 13}
        return {"prompt_embeds": embeds[0], "negative_prompt_embeds": embeds[1], "guidance_scale": 3.0, **size}
