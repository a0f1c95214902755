"""What HunyuanVideo and Framepack share: a small autoencoder and the arguments of a run."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKLHunyuanVideo


def hunyuan_vae() -> AutoencoderKLHunyuanVideo:
    """A random autoencoder; runs stop at the latents, so it mostly tells sizes."""
    return AutoencoderKLHunyuanVideo(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        mid_block_add_attention=False,
    )


def hunyuan_arguments() -> dict[str, Any]:
    """Call arguments with guidance on: two transformer calls for every step."""
    embeds, pooled, mask = torch.randn(2, 1, 12, 16), torch.randn(2, 1, 8), torch.ones(1, 12)
    return {
        "prompt_embeds": embeds[0],
        "pooled_prompt_embeds": pooled[0],
        "prompt_attention_mask": mask,
        "negative_prompt_embeds": embeds[1],
        "negative_pooled_prompt_embeds": pooled[1],
        "negative_prompt_attention_mask": mask,
        "true_cfg_scale": 3.0,
        "height": 128,
        "width": 160,
        "num_frames": 13,
    }
