"""SLG, skip-layer guidance: guide away from a pass without some blocks (Stability AI's SD3.5 reference, 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dit_attn.errors import DitAttnError
from dit_attn.processors.guidance.perturbation import Perturbation
from dit_attn.processors.methods.base import setting
from dit_attn.processors.methods.perturbed_guidance import Layers, PerturbedGuidance, block_numbers, blocks_at


@dataclass(frozen=True, kw_only=True)
class SLG(PerturbedGuidance):
    """Guide away from a pass that skips blocks; the defaults are those of the SD3.5 reference.

    Args:
        layers: positions of the skipped blocks, e.g. ``"7-9"``; empty: the middle block.
    """

    slug: ClassVar[str] = "slg"

    scale: float = setting(2.8, "guidance strength w", low=0.0)
    start: float = setting(0.01, "first guided step, as a fraction of the run", low=0.0, high=1.0)
    stop: float = setting(0.2, "last guided step + 1, as a fraction of the run", low=0.0, high=1.0)
    layers: str = setting("", "blocks to skip, e.g. '7-9'; empty: the middle one", example="2")

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", block_numbers(self.layers))
        super().__post_init__()
        if self.batched:
            raise DitAttnError("slg skips blocks for the perturbed rows alone, which one call cannot; drop batched")

    def perturbation(self, layers: Layers, blocks: list[str]) -> Perturbation:
        """Return the blocks that are skipped."""
        return Perturbation({}, skipped=blocks_at(self.layers, blocks))
