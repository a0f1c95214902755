"""Latents in the form of a pipeline: what it decodes is what was encoded, and packing is its own."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch

from dit_attn import DitAttnError, models
from dit_attn.pipelines.high_resolution.latents import FORMS, encode, enlarged, form_of, pixels_per_token


@pytest.mark.parametrize("name", ["tiny-image", "tiny-joint", "tiny-video"])
def test_the_pipeline_decodes_to_the_pixels_that_were_encoded(name: str) -> None:
    pipe = models.load(name)
    shape = (2, 3, 5, 16, 24) if form_of(pipe).video else (2, 3, 16, 24)
    pixels = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    latents = encode(pipe, pixels)
    if form_of(pipe).video:
        config = pipe.vae.config
        mean, std = (torch.tensor(x).view(1, -1, 1, 1, 1) for x in (config.latents_mean, config.latents_std))
        raw = latents * std + mean
    else:
        raw = latents / pipe.vae.config.scaling_factor + (pipe.vae.config.shift_factor or 0.0)
    with torch.no_grad():
        decoded = pipe.vae.decode(raw, return_dict=False)[0]
    torch.testing.assert_close(decoded / 2 + 0.5, pixels, atol=1e-3, rtol=0)


def test_a_clip_that_the_autoencoder_cuts_short_is_refused() -> None:
    with pytest.raises(DitAttnError, match="the autoencoder keeps 1 of 3 frames; ask for 4 n"):
        encode(models.load("tiny-video"), torch.rand(1, 3, 3, 16, 16))


def test_packed_latents_are_those_of_flux() -> None:
    latents = torch.randn(2, 16, 8, 12)
    stock = diffusers.FluxPipeline._pack_latents(latents, 2, 16, 8, 12)
    assert torch.equal(FORMS["FluxPipeline"].pack(None, latents), stock)


@pytest.mark.parametrize("name, unit", [("tiny-image", 4), ("tiny-joint", 4), ("tiny-video", 4)])
def test_the_side_of_a_token_in_pixels(name: str, unit: int) -> None:
    pipe = models.load(name)
    assert pixels_per_token(pipe) == unit


@pytest.mark.parametrize("shape", [(2, 3, 8, 12), (2, 3, 4, 8, 12)])
@pytest.mark.parametrize("filter", ["bicubic", "bilinear", "nearest-exact"])
def test_a_plain_picture_stays_plain_and_frames_do_not_mix(shape: Any, filter: str) -> None:
    pixels = torch.full(shape, 0.25)
    if len(shape) == 5:
        pixels[:, :, 1] = 0.75
    out = enlarged(pixels, 16, 24, filter)
    assert out.shape == (*shape[:-2], 16, 24)
    torch.testing.assert_close(out, pixels.repeat_interleave(2, -1).repeat_interleave(2, -2))


def test_a_pipeline_that_is_not_among_them_is_refused() -> None:
    with pytest.raises(
        DitAttnError, match="high resolution is not there yet for object; it is for CogVideoXPipeline, FluxPipeline"
    ):
        form_of(object())
