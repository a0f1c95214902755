"""STG, spatiotemporal skip guidance (arXiv 2411.18664): guide away from a pass without some self-attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dit_attn.errors import DitAttnError
from dit_attn.processors.guidance import heads
from dit_attn.processors.guidance.perturbation import Perturbation
from dit_attn.processors.methods.base import setting
from dit_attn.processors.methods.perturbed_guidance import Layers, PerturbedGuidance, block_numbers, blocks_at


@dataclass(frozen=True, kw_only=True)
class STG(PerturbedGuidance):
    """Guide away from a pass that skips self-attention or blocks; made for videos.

    Args:
        layers: positions of the blocks, e.g. ``"11"``; empty: the middle one.
        mode: ``attention``: their self-attention becomes the identity; ``residual``: the blocks are skipped.
    """

    slug: ClassVar[str] = "stg"

    scale: float = setting(1.0, "guidance strength w", low=0.0)
    layers: str = setting("", "blocks to perturb, e.g. '11'; empty: the middle one", example="3")
    mode: str = setting("attention", "what is skipped", choices=("attention", "residual"))

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", block_numbers(self.layers))
        super().__post_init__()
        if self.batched and self.mode == "residual":
            raise DitAttnError("stg skips blocks for the perturbed rows alone, which one call cannot; drop batched")

    def perturbation(self, layers: Layers, blocks: list[str]) -> Perturbation:
        """Return the layers whose attention is replaced, or the blocks that are skipped."""
        wanted = blocks_at(self.layers, blocks)
        if self.mode == "residual":
            return Perturbation({}, skipped=wanted)
        inside = [layer for layer in layers if any(layer.startswith(f"{name}.") for name in wanted)]
        if not inside:
            raise DitAttnError(f"block {wanted[0]} has no self-attention to perturb; choose another layer")
        return Perturbation(heads.resolve(";".join(inside), layers, 1.0))
