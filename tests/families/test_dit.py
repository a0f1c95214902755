"""DiT, conditioned on classes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

from tests._support.family_cases import ImageCase


class LatentPipeline(DiTPipeline):
    """The stock pipeline, which always decodes; it hands on what the autoencoder here leaves as it is."""

    def __call__(self, *args: Any, output_type: str = "pt", **kwargs: Any) -> Any:
        return super().__call__(*args, output_type="pt", **kwargs)


class Latents(torch.nn.Module):
    """Stands in for the autoencoder."""

    config = SimpleNamespace(scaling_factor=1.0)
    device, dtype = torch.device("cpu"), torch.float32

    def decode(self, latents: torch.Tensor) -> Any:
        """The latents."""
        return SimpleNamespace(sample=latents)


class TestDiT(ImageCase):
    kinds = ("image",)
    grid = (1, 16, 16)
    rotary = False

    def model(self) -> torch.nn.Module:
        return DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=8, num_layers=2, sample_size=32
        )

    def inputs(self) -> dict[str, Any]:
        return {
            "hidden_states": torch.randn(2, 4, 32, 32),
            "timestep": torch.tensor([500, 500]),
            "class_labels": torch.tensor([3, 1000]),
        }

    def pipeline(self) -> tuple[Any, dict[str, Any]]:
        pipe = LatentPipeline(transformer=self.model().eval(), vae=Latents(), scheduler=DDIMScheduler())
        return pipe, {"class_labels": [3], "guidance_scale": 3.0}
