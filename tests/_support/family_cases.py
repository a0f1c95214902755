"""What the families' test cases share: grids, sizes, tables of positions and a small autoencoder."""

from __future__ import annotations

import importlib
from typing import Any

import diffusers
import pytest
import torch
from diffusers import AutoencoderKL

from tests._support.family_mixin import FamilyMixin

HEIGHT, WIDTH = 16, 18  # of an image, in tokens
SIZE = {"height": 16 * HEIGHT, "width": 16 * WIDTH}  # in pixels: a token is 2 x 2 latents of 8 x 8 pixels


def tiny_vae(channels: int = 4) -> AutoencoderKL:
    """A random autoencoder with the usual spatial factor of 8; runs stop at the latents, so it only tells sizes."""
    blocks = 4
    return AutoencoderKL(
        block_out_channels=(4,) * blocks,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        latent_channels=channels,
        norm_num_groups=1,
        layers_per_block=1,
        shift_factor=0.0,
        scaling_factor=1.0,
    )


def inner_class(path: str) -> Any:
    """A class that diffusers does not export, by its module and name; a version without it skips the test."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(f"diffusers.models.transformers.{module}"), name)
    except (ImportError, AttributeError):
        pytest.skip(f"diffusers {diffusers.__version__} has no {name}")


def image_ids(columns: int = 3, kind: int = 0, height: int = HEIGHT, width: int = WIDTH) -> torch.Tensor:
    """(height * width, columns) rows of kind, y, x, and zeros."""
    ys, xs = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    ids = torch.zeros(height * width, columns)
    ids[:, 0], ids[:, 1], ids[:, 2] = kind, ys.flatten(), xs.flatten()
    return ids


class VideoCase(FamilyMixin):
    """A video of 4 frames of 8 x 10 tokens."""

    grid = (4, 8, 10)
    probe = (2, 3, 5)
    sockets = 2


class ImageCase(FamilyMixin):
    """An image of 16 x 18 tokens."""

    grid = (1, HEIGHT, WIDTH)
    sockets = 2


class PackedCase(ImageCase):
    """Latents that come as one vector per token."""

    def poke_token(self, inputs: dict[str, Any], at: tuple[int, int, int]) -> None:
        inputs["hidden_states"][:, at[1] * WIDTH + at[2]] += 1.0
