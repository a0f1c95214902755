"""Latents of pixels, in the form in which a stock pipeline takes them: encoded, normalized, packed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from dit_attn.errors import DitAttnError

FILTERS = ("bicubic", "bilinear", "nearest-exact")


@dataclass(frozen=True)
class Form:
    """How a kind of pipeline holds its latents.

    Attributes:
        video: whether it makes clips.
        patch: pixels of the latents along each side of a token, from the transformer's configuration.
        pack: latents (B, C, [F,] H, W) in the pipeline's form.
    """

    video: bool
    patch: Callable[[Any], int]
    pack: Callable[[Any, torch.Tensor], torch.Tensor] = lambda pipe, latents: latents


def _pack_squares(pipe: Any, latents: torch.Tensor) -> torch.Tensor:
    """(B, H / 2 * W / 2, 4 C): two by two pixels of the latents side by side."""
    return F.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)


FORMS: dict[str, Form] = {
    "PixArtSigmaPipeline": Form(False, lambda config: config.patch_size),
    "PixArtAlphaPipeline": Form(False, lambda config: config.patch_size),
    "StableDiffusion3Pipeline": Form(False, lambda config: config.patch_size),
    "FluxPipeline": Form(False, lambda config: 2, _pack_squares),
    "WanPipeline": Form(True, lambda config: config.patch_size[-1]),
}


def form_of(pipe: Any) -> Form:
    """Return the form of a pipeline's latents, by its class.

    Raises:
        DitAttnError: a pipeline that is not among them.
    """
    name = type(pipe).__name__
    if name not in FORMS:
        raise DitAttnError(f"high resolution is not there yet for {name}; it is for {', '.join(sorted(FORMS))}")
    return FORMS[name]


def pixels_per_token(pipe: Any) -> int:
    """Return the pixels along each side of a visual token."""
    scale = next(
        getattr(pipe, name) for name in ("vae_scale_factor_spatial", "vae_scale_factor") if hasattr(pipe, name)
    )
    return int(scale) * form_of(pipe).patch(pipe.transformer.config)


def enlarged(pixels: torch.Tensor, height: int, width: int, filter: str) -> torch.Tensor:
    """Resize images (B, C, H, W) or the frames of clips (B, C, F, H, W), in [0, 1]."""
    frames = pixels.transpose(1, 2).flatten(0, 1) if pixels.ndim == 5 else pixels
    smooth = {} if filter == "nearest-exact" else {"antialias": True, "align_corners": False}
    out = F.interpolate(frames.float(), (height, width), mode=filter, **smooth).clamp(0.0, 1.0)
    return out.unflatten(0, (len(pixels), -1)).transpose(1, 2) if pixels.ndim == 5 else out


@torch.no_grad()
def encode(pipe: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Encode pixels in [0, 1]: the mode of the posterior, normalized as the pipeline's latents are; fp32.

    Raises:
        DitAttnError: a clip of a length that the autoencoder cuts short.
    """
    vae = pipe.vae
    posterior = vae.encode((pixels * 2.0 - 1.0).to(vae.device, vae.dtype)).latent_dist
    latents = posterior.mode().float()
    config = vae.config
    if latents.ndim == 5:
        frames, factor = pixels.shape[2], int(pipe.vae_scale_factor_temporal)
        if (latents.shape[2] - 1) * factor + 1 < frames:
            kept = (latents.shape[2] - 1) * factor + 1
            raise DitAttnError(f"the autoencoder keeps {kept} of {frames} frames; ask for 4 n or 4 n + 1 frames")
    if getattr(config, "latents_mean", None) is not None and getattr(config, "latents_std", None) is not None:
        shape = (1, -1, *(1,) * (latents.ndim - 2))
        mean, std = (latents.new_tensor(x).view(shape) for x in (config.latents_mean, config.latents_std))
        return (latents - mean) / std
    return (latents - (getattr(config, "shift_factor", None) or 0.0)) * config.scaling_factor
