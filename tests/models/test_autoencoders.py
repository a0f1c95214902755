"""The formula-made autoencoders encode and decode exactly."""

from __future__ import annotations

import pytest
import torch

from dit_attn import models
from dit_attn.models.autoencoders import exact_kl, exact_wan, space_to_depth


@torch.no_grad()
@pytest.mark.parametrize("size", [(8, 8), (32, 48), (128, 128)])
def test_image_latent_is_the_image_and_decodes_to_it(size):
    vae = exact_kl()
    image = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latent = vae.encode(image).latent_dist.sample()
    assert float((latent - image).abs().max()) < 1e-4
    assert float((vae.decode(latent).sample - image).abs().max()) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("frames", [1, 5, 9])
def test_video_latent_is_the_space_to_depth_and_decodes_to_the_video(frames):
    vae = exact_wan(2)
    video = torch.rand(1, 3, frames, 24, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latent = vae.encode(video).latent_dist.sample()
    assert float((latent - space_to_depth(video, 2)).abs().max()) < 1e-4
    assert float((vae.decode(latent).sample - video).abs().max()) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("name", ["tiny-image", "tiny-video"])
def test_shipped_autoencoders_are_exact(name):
    vae = models.load(name).vae
    shape = (1, 3, 32, 32) if name == "tiny-image" else (1, 3, 5, 32, 32)
    pixels = torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    restored = vae.decode(vae.encode(pixels).latent_dist.mode()).sample
    assert float((restored - pixels).abs().max()) < 1e-4
