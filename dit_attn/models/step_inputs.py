"""Arguments of one transformer call in the middle of a run, shaped like those a family's pipeline gives.

Every function takes the architecture, the grid (T, H, W) of visual tokens, and ``batch``, ``dtype`` and ``generator``.
Tensors are made on torch's default device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from dit_attn.models.architectures import Architecture

Grid = tuple[int, int, int]


def _noise(options: dict[str, Any], *shape: int) -> torch.Tensor:
    return torch.randn(options["batch"], *shape, dtype=options["dtype"], generator=options["generator"])


def wan(arch: Architecture, grid: Grid, options: dict[str, Any]) -> dict[str, Any]:
    """(B, 16, T, 2H, 2W) latents and 512 vectors of a text encoder."""
    t, h, w = grid
    return {
        "hidden_states": _noise(options, 16, t, 2 * h, 2 * w),
        "timestep": torch.full((options["batch"],), 500),
        "encoder_hidden_states": _noise(options, arch.text, 4096),
    }


def hunyuan_video(arch: Architecture, grid: Grid, options: dict[str, Any]) -> dict[str, Any]:
    """The same with a prompt that fills half of its places, a pooled vector and the guidance scale."""
    words = torch.arange(arch.text) < arch.text // 2  # a prompt fills half of its places
    return {
        **wan(arch, grid, options),
        "encoder_attention_mask": words.expand(options["batch"], -1).to(options["dtype"]),
        "pooled_projections": _noise(options, 768),
        "guidance": torch.full((options["batch"],), 6000.0, dtype=options["dtype"]),
    }


def cogvideox(arch: Architecture, grid: Grid, options: dict[str, Any]) -> dict[str, Any]:
    """(B, T, 16, 2H, 2W) latents, text, and the rotary table the pipeline makes."""
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    t, h, w = grid
    device = torch.get_default_device()
    rope = get_3d_rotary_pos_embed(arch.head_dim, ((0, 0), (h, w)), (h, w), t, device=device)
    return {
        "hidden_states": _noise(options, t, 16, 2 * h, 2 * w),
        "encoder_hidden_states": _noise(options, arch.text, 4096),
        "timestep": torch.full((options["batch"],), 500),
        "image_rotary_emb": rope,
    }


def flux(arch: Architecture, grid: Grid, options: dict[str, Any]) -> dict[str, Any]:
    """(B, H W, 64) packed latents, text, and the places of all tokens."""
    _, h, w = grid
    places = torch.cartesian_prod(torch.zeros(1), torch.arange(h).float(), torch.arange(w).float())
    return {
        "hidden_states": _noise(options, h * w, 64),
        "encoder_hidden_states": _noise(options, arch.text, 4096),
        "pooled_projections": _noise(options, 768),
        "timestep": torch.full((options["batch"],), 0.5, dtype=options["dtype"]),
        "img_ids": places,
        "txt_ids": torch.zeros(arch.text, 3),
        "guidance": torch.full((options["batch"],), 3.5, dtype=torch.float32),
    }


def pixart(arch: Architecture, grid: Grid, options: dict[str, Any]) -> dict[str, Any]:
    """(B, 4, 2H, 2W) latents and text."""
    _, h, w = grid
    return {
        "hidden_states": _noise(options, 4, 2 * h, 2 * w),
        "encoder_hidden_states": _noise(options, arch.text, 4096),
        "encoder_attention_mask": torch.ones(options["batch"], arch.text, dtype=options["dtype"]),
        "timestep": torch.full((options["batch"],), 500),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }
