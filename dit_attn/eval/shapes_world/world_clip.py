"""``world-clip``: a small CLIP model of the shapes world, so that FID, KID and CLIP score need no download.

Its scores are called ``fid-world``, ``kid-world`` and ``clip-world``: they judge images of the world, nothing else.
The weights come from ``dit-attn train world-clip``.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

FOLDER = Path(__file__).parents[1] / "weights" / "world-clip"
SIZE = 64


@lru_cache(maxsize=2)
def load(folder: Path = FOLDER) -> tuple[Any, Any]:
    """Load the CLIP model, in evaluation mode, and its processor."""
    from transformers import CLIPModel, CLIPProcessor

    return CLIPModel.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder)


class WorldFeatures(nn.Module):
    """Image features for FID, KID and IS: uint8 (N, 3, H, W) to (N, 96) fp32."""

    name = "world-clip"

    def __init__(self, folder: Path = FOLDER) -> None:
        super().__init__()
        self.vision = load(folder)[0].vision_model
        self.num_features = int(self.vision.config.hidden_size)

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the pooled state of the vision tower."""
        return self.vision(pixel_values=pixels(images)).pooler_output.float()


def pixels(images: torch.Tensor) -> torch.Tensor:
    """Convert uint8 (N, 3, H, W) to (N, 3, 64, 64) in [-1, 1], as the processor does."""
    values = images.float() / 255
    if values.shape[2:] != (SIZE, SIZE):
        values = nn.functional.interpolate(values, (SIZE, SIZE), mode="bicubic", antialias=True).clamp(0, 1)
    return values * 2 - 1


@torch.no_grad()
def world_scores(images: torch.Tensor, captions: list[str], folder: Path = FOLDER) -> torch.Tensor:
    """Compute (N,) 100 x cosine of every image, uint8 (N, 3, H, W), and its caption."""
    model, processor = load(folder)
    model = model.to(images.device)
    tokens = processor(text=captions, return_tensors="pt", padding=True, truncation=True).to(images.device)
    out = model(pixel_values=pixels(images), **tokens)
    return 100.0 * (out.image_embeds * out.text_embeds).sum(-1)
