"""Arguments of one transformer call in the middle of a run, shaped like those a family's pipeline gives.

Tensors are made on torch's default device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class CallShape:
    """What decides the arguments.

    Attributes:
        grid: (T, H, W) visual tokens.
        text: text tokens, padding counted.
        head_dim: size of a head.
        batch: samples.
        dtype: of the latents and the text.
        generator: of the noise, on the device of the tensors.
    """

    grid: Grid
    text: int
    head_dim: int
    batch: int
    dtype: torch.dtype
    generator: torch.Generator

    def noise(self, *shape: int) -> torch.Tensor:
        """Draw Gaussian noise of (batch, *shape)."""
        return torch.randn(self.batch, *shape, dtype=self.dtype, generator=self.generator)

    def full(self, value: float, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return (batch,) of one value."""
        return torch.full((self.batch,), value, dtype=dtype)


def wan(call: CallShape) -> dict[str, Any]:
    """Make (B, 16, T, 2H, 2W) latents and the vectors of a text encoder."""
    t, h, w = call.grid
    return {
        "hidden_states": call.noise(16, t, 2 * h, 2 * w),
        "timestep": call.full(500),
        "encoder_hidden_states": call.noise(call.text, 4096),
    }


def hunyuan_video(call: CallShape) -> dict[str, Any]:
    """Make those of Wan with a prompt that fills half of its places, a pooled vector and the guidance scale."""
    words = torch.arange(call.text) < call.text // 2  # a prompt fills half of its places
    return {
        **wan(call),
        "encoder_attention_mask": words.expand(call.batch, -1).to(call.dtype),
        "pooled_projections": call.noise(768),
        "guidance": call.full(6000.0, call.dtype),
    }


def cogvideox(call: CallShape) -> dict[str, Any]:
    """Make (B, T, 16, 2H, 2W) latents, text, and the rotary table of the pipeline."""
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    t, h, w = call.grid
    device = torch.get_default_device()
    rope = get_3d_rotary_pos_embed(call.head_dim, ((0, 0), (h, w)), (h, w), t, device=device)
    return {
        "hidden_states": call.noise(t, 16, 2 * h, 2 * w),
        "encoder_hidden_states": call.noise(call.text, 4096),
        "timestep": call.full(500),
        "image_rotary_emb": rope,
    }


def flux(call: CallShape) -> dict[str, Any]:
    """Make (B, H W, 64) packed latents, text, and the positions of all tokens."""
    _, h, w = call.grid
    places = torch.cartesian_prod(torch.zeros(1), torch.arange(h).float(), torch.arange(w).float())
    return {
        "hidden_states": call.noise(h * w, 64),
        "encoder_hidden_states": call.noise(call.text, 4096),
        "pooled_projections": call.noise(768),
        "timestep": call.full(0.5, call.dtype),
        "img_ids": places,
        "txt_ids": torch.zeros(call.text, 3),
        "guidance": call.full(3.5, torch.float32),
    }


def ltx_video(call: CallShape) -> dict[str, Any]:
    """Make (B, T H W, 128) latents, a token each, text, and the size of the video in tokens."""
    t, h, w = call.grid
    return {
        "hidden_states": call.noise(t * h * w, 128),
        "encoder_hidden_states": call.noise(call.text, 4096),
        "encoder_attention_mask": torch.ones(call.batch, call.text, dtype=call.dtype),
        "timestep": call.full(500),
        "num_frames": t,
        "height": h,
        "width": w,
    }


def qwen_image_2_1(call: CallShape) -> dict[str, Any]:
    """Make (B, H W, 64) latents and text; of the image, 2 x 2 tokens are one place of ``img_mask``."""
    _, h, w = call.grid
    places = torch.arange(call.text + h * w // 4) >= call.text
    return {
        "hidden_states": call.noise(h * w, 64),
        "encoder_hidden_states": call.noise(call.text, 4096),
        "timestep": call.full(0.5, call.dtype),
        "img_shapes": [[(1, h, w)]] * call.batch,
        "img_mask": places.expand(call.batch, -1),
    }


def pixart(call: CallShape) -> dict[str, Any]:
    """Make (B, 4, 2H, 2W) latents and text."""
    _, h, w = call.grid
    return {
        "hidden_states": call.noise(4, 2 * h, 2 * w),
        "encoder_hidden_states": call.noise(call.text, 4096),
        "encoder_attention_mask": torch.ones(call.batch, call.text, dtype=call.dtype),
        "timestep": call.full(500),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }
