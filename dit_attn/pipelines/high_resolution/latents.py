"""Latents of pixels, in the form in which a stock pipeline takes them: encoded, normalized, packed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from dit_attn.errors import DitAttnError
from dit_attn.processors.attach import compat

FILTERS = ("bicubic", "bilinear", "nearest-exact")
SPACES = ("pixel", "latent")
Patch = tuple[int, int]


@dataclass(frozen=True)
class Form:
    """How a kind of pipeline holds its latents.

    Attributes:
        video: whether it makes clips.
        patch: (t, h or w) pixels of the latents along each side of a token, of the pipeline.
        packed: latents are (B, tokens, channels of a token) rather than (B, C, [F,] H, W).
        frames_first: latents are (B, F, C, H, W).
        single_frame: the autoencoder takes clips, and the pipeline makes them of one frame.
    """

    video: bool
    patch: Callable[[Any], Patch]
    packed: bool = False
    frames_first: bool = False
    single_frame: bool = False

    def pack(self, pipe: Any, latents: torch.Tensor) -> torch.Tensor:
        """Return latents (B, C, [F,] H, W) in the pipeline's form."""
        if self.packed:
            boxes = latents if latents.ndim == 5 else latents[:, :, None]
            (t, side), (_, _, frames, height, width) = self.patch(pipe), boxes.shape
            boxes = boxes.unflatten(4, (width // side, side)).unflatten(3, (height // side, side))
            boxes = boxes.unflatten(2, (frames // t, t))
            return boxes.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4, 7).flatten(1, 3)
        return latents.transpose(1, 2) if self.frames_first else latents

    def unpack(self, pipe: Any, latents: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Return latents in the pipeline's form as (B, C, [F,] H, W); ``height`` and ``width`` in tokens."""
        if self.packed:
            t, side = self.patch(pipe)
            boxes = latents.unflatten(1, (-1, height, width)).unflatten(4, (-1, t, side, side))
            boxes = boxes.permute(0, 4, 1, 5, 2, 6, 3, 7).flatten(6, 7).flatten(4, 5).flatten(2, 3)
            return boxes if self.video else boxes[:, :, 0]
        return latents.transpose(1, 2) if self.frames_first else latents


def _of_transformer(pipe: Any) -> Patch:
    patch = pipe.transformer.config.patch_size
    if isinstance(patch, (tuple, list)):
        return int(patch[0]), int(patch[-1])
    return int(getattr(pipe.transformer.config, "patch_size_t", None) or 1), int(patch)


def _of_ltx(pipe: Any) -> Patch:
    return int(pipe.transformer_temporal_patch_size), int(pipe.transformer_spatial_patch_size)


FORMS: dict[str, Form] = {
    "PixArtSigmaPipeline": Form(False, _of_transformer),
    "PixArtAlphaPipeline": Form(False, _of_transformer),
    "StableDiffusion3Pipeline": Form(False, _of_transformer),
    "FluxPipeline": Form(False, lambda pipe: (1, 2), packed=True),
    "QwenImagePipeline": Form(False, lambda pipe: (1, 2), packed=True, single_frame=True),
    "WanPipeline": Form(True, _of_transformer),
    "HunyuanVideoPipeline": Form(True, _of_transformer),
    "CogVideoXPipeline": Form(True, _of_transformer, frames_first=True),
    "LTXPipeline": Form(True, _of_ltx, packed=True),
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
    return _compression(pipe, "spatial") * form_of(pipe).patch(pipe)[1]


def _compression(pipe: Any, axis: str) -> int:
    names = (f"vae_scale_factor_{axis}", f"vae_{axis}_compression_ratio", "vae_scale_factor")
    return int(next(getattr(pipe, name) for name in names if hasattr(pipe, name)))


def enlarged(values: torch.Tensor, height: int, width: int, filter: str, space: str = "pixel") -> torch.Tensor:
    """Resize images (B, C, H, W) or the frames of clips (B, C, F, H, W); pixels stay in [0, 1]."""
    frames = values.transpose(1, 2).flatten(0, 1) if values.ndim == 5 else values
    smooth = {} if filter == "nearest-exact" else {"antialias": True, "align_corners": False}
    out = F.interpolate(frames.float(), (height, width), mode=filter, **smooth)
    out = out.clamp(0.0, 1.0) if space == "pixel" else out
    return out.unflatten(0, (len(values), -1)).transpose(1, 2) if values.ndim == 5 else out


@torch.no_grad()
def encode(pipe: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Encode pixels in [0, 1]: the mode of the posterior, normalized as the pipeline's latents are; fp32.

    Raises:
        DitAttnError: a clip of a length that the autoencoder cuts short.
    """
    vae, single = pipe.vae, form_of(pipe).single_frame
    values = (pixels * 2.0 - 1.0).to(compat.execution_device(pipe), vae.dtype)
    latents = vae.encode(values[:, :, None] if single else values).latent_dist.mode().float()
    if single:
        latents = latents[:, :, 0]
    if latents.ndim == 5:
        frames, factor = pixels.shape[2], _compression(pipe, "temporal")
        kept = (latents.shape[2] - 1) * factor + 1
        if kept < frames:
            n = max(factor, 4)
            raise DitAttnError(f"the autoencoder keeps {kept} of {frames} frames; ask for {n} n or {n} n + 1 frames")
    return _whole_tokens(pipe, _normalized(vae, latents))


def _normalized(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    config = vae.config
    factor = float(getattr(config, "scaling_factor", None) or 1.0)
    mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    buffers = dict(vae.named_buffers(recurse=False))
    if "latents_mean" in buffers:
        mean, std = buffers["latents_mean"], buffers["latents_std"]
    elif mean is not None and std is not None:
        factor = 1.0
    if mean is None or std is None:
        return (latents - (getattr(config, "shift_factor", None) or 0.0)) * factor
    shape = (1, -1, *(1,) * (latents.ndim - 2))
    mean, std = (torch.as_tensor(x, device=latents.device, dtype=latents.dtype).view(shape) for x in (mean, std))
    return (latents - mean) * factor / std


def _whole_tokens(pipe: Any, latents: torch.Tensor) -> torch.Tensor:
    """Latents of clips with the first frame repeated in front where tokens of several frames need it."""
    side = form_of(pipe).patch(pipe)[0]
    missing = -latents.shape[2] % side if latents.ndim == 5 else 0
    return torch.cat([latents[:, :, :1]] * missing + [latents], 2) if missing else latents
