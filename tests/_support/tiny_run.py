"""Helpers of the calibration tests: an embedded pipeline at its smallest, and a runner that counts its runs."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

from dit_attn import BlockSparse, models

STEPS, LAYERS = 2, 6
METHOD = BlockSparse(density=0.25, q_block=32, kv_block=32, dense_steps=0)
CALL = {**models.call_defaults("tiny-image"), "height": 64, "width": 64, "num_inference_steps": STEPS}


def load() -> Any:
    """Load the embedded image pipeline without a progress bar."""
    pipe = models.load("tiny-image")
    pipe.set_progress_bar_config(disable=True)
    return pipe


class CountedRuns:
    """Runs items of 256 tokens, with the length of the name as seed, and counts the runs.

    Attributes:
        made: number of runs by item.
        stop_at: raise KeyboardInterrupt at this run.
    """

    def __init__(self, pipe: Any, stop_at: int | None = None) -> None:
        self.pipe, self.stop_at = pipe, stop_at
        self.made: Counter[str] = Counter()

    def __call__(self, item: str) -> torch.Tensor:
        if self.stop_at is not None and self.made.total() >= self.stop_at:
            raise KeyboardInterrupt
        self.made[item] += 1
        generator = torch.Generator().manual_seed(len(item))
        latents: torch.Tensor = self.pipe(f"a {item} circle", generator=generator, output_type="latent", **CALL).images
        return latents
