"""Arguments of one transformer call in the middle of a run, shaped like those a family's pipeline gives.

Tensors are made on torch's default device.
"""

from __future__ import annotations

from collections.abc import Mapping
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
        config: of the transformer.
        batch: samples.
        dtype: of the latents and the text.
        generator: of the noise, on the device of the tensors.
    """

    grid: Grid
    text: int
    config: Mapping[str, Any]
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
    head_dim = call.config["attention_head_dim"]
    rope = get_3d_rotary_pos_embed(head_dim, ((0, 0), (h, w)), (h, w), t, device=device)
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


def krea_2(call: CallShape) -> dict[str, Any]:
    """Make (B, H W, 64) latents, of the text the 12 layers of its encoder that are fused, and all positions."""
    _, h, w = call.grid
    places = torch.cartesian_prod(torch.zeros(1), torch.arange(h).float(), torch.arange(w).float())
    words = torch.arange(call.text) < call.text // 2  # a prompt fills half of its places
    return {
        "hidden_states": call.noise(h * w, 64),
        "encoder_hidden_states": call.noise(call.text, 12, call.config["text_hidden_dim"]),
        "timestep": call.full(0.5, call.dtype),
        "position_ids": torch.cat([torch.zeros(call.text, 3), places]),
        "encoder_attention_mask": words.expand(call.batch, -1),
    }


def minimax_h3(call: CallShape) -> dict[str, Any]:
    """Make the packed rows of text, sound in two channels, and video: (B, T H W, 96) latents."""
    t, h, w = call.grid
    frames = (t - 2) // 5 * 17 + 5
    sound = 2 * round(frames / 24 * 40)  # 40 latents a second
    sizes = {"text": call.text, "audio": sound, "video": t * h * w}
    text, audio, video = torch.arange(sum(sizes.values())).split(list(sizes.values()))
    places = torch.zeros(sum(sizes.values()), 3)
    places[text, 0] = text.float()
    places[audio, 0] = call.text + torch.arange(sound // 2).repeat(2).float()
    grid = torch.meshgrid(call.text + torch.arange(t), torch.arange(h), torch.arange(w), indexing="ij")
    places[video] = torch.stack(grid, -1).flatten(0, 2).float()
    tags = torch.cat([torch.full((size,), tag) for size, tag in zip(sizes.values(), (1, 2, 0))])
    return {
        "hidden_states": call.noise(t * h * w, 96),
        "audio_hidden_states": call.noise(sound, 32),
        "encoder_hidden_states": call.noise(call.text, 5120),
        "timestep": torch.tensor([0.5]),
        "timestep_indices": torch.zeros(len(tags), dtype=torch.long),
        "token_tags": tags,
        "position_ids": places,
        "video_indices": video,
        "audio_indices": audio,
        "text_indices": text,
    }


def cosmos_3(call: CallShape) -> dict[str, Any]:
    """Make the packed rows of text and video: (1, 48, T, 2H, 2W) latents, all of them noisy."""
    t, h, w = call.grid
    rows = torch.arange(call.text, call.text + t * h * w)
    grid = torch.meshgrid(torch.arange(t), torch.arange(h), torch.arange(w), indexing="ij")
    places = torch.cat([torch.arange(call.text).expand(3, -1), torch.stack(grid).flatten(1)], 1)
    return {
        "input_ids": torch.arange(call.text),
        "text_indexes": torch.arange(call.text),
        "position_ids": places.float(),
        "und_len": call.text,
        "sequence_length": call.text + len(rows),
        "vision_tokens": [call.noise(48, t, 2 * h, 2 * w)],
        "vision_token_shapes": [call.grid],
        "vision_sequence_indexes": rows,
        "vision_mse_loss_indexes": rows,
        "vision_timesteps": torch.full((len(rows),), 500.0),
        "vision_noisy_frame_indexes": [torch.arange(t)],
    }
