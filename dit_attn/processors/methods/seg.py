"""SEG, smoothed-energy guidance (arXiv 2408.00760): guide away from attention with blurred queries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dit_attn.processors.guidance import heads
from dit_attn.processors.guidance.perturbation import Perturbation
from dit_attn.processors.methods.base import setting
from dit_attn.processors.methods.perturbed_guidance import Layers, PerturbedGuidance, middle_layer


@dataclass(frozen=True, kw_only=True)
class SEG(PerturbedGuidance):
    """Guide away from attention whose queries a Gaussian has blurred within their frame.

    Args:
        heads: as for :class:`SoftPAG`.
        u: strength of the perturbation, 0 (unchanged) to 1 (replaced).
        sigma: standard deviation of the blur in tokens; above 9999 the blurred query is the mean over all frames.
    """

    slug: ClassVar[str] = "seg"

    heads: str = setting("", "heads to perturb; empty: the middle layer")
    u: float = setting(1.0, "strength of the perturbation", low=0.0, high=1.0)
    sigma: float = setting(10_000.0, "standard deviation of the query blur, in tokens", low=0.0)

    def __post_init__(self) -> None:
        object.__setattr__(self, "heads", heads.canonical(self.heads))
        super().__post_init__()

    def perturbation(self, layers: Layers, blocks: list[str]) -> Perturbation:
        """Return the strengths of the heads, resolved on this transformer, and the blur."""
        strengths = heads.resolve(self.heads or middle_layer(layers), layers, self.u)
        return Perturbation(strengths, target="blurred-query", joint="image-rows", sigma=self.sigma)
