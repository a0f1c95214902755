"""DiT, class to image, with layers of equal and of different numbers of heads."""

from __future__ import annotations

from typing import Any

import torch

from dit_attn.pipelines.finetune import moh_transformer
from tests._support.family_cases import ImageCase

SIDE = 16  # tokens; DiT takes square images of its own size


class TestDiT(ImageCase):
    kinds = ("image",)
    grid = (1, SIDE, SIDE)
    rotary = False
    no_pipeline = "DiTPipeline decodes whatever output_type says, and has no prompt"

    def model(self) -> torch.nn.Module:
        return moh_transformer(
            ((2, 2, 0), (3, 3, 0)), heads=2, head_dim=12, in_channels=4, out_channels=4, sample_size=2 * SIDE,
            num_embeds_ada_norm=10,
        )  # fmt: skip

    def inputs(self) -> dict[str, Any]:
        return {
            "hidden_states": torch.randn(2, 4, 2 * SIDE, 2 * SIDE),
            "timestep": torch.tensor([500, 500]),
            "class_labels": torch.tensor([1, 3]),
        }
