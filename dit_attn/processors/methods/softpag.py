"""SoftPAG (arXiv 2506.10978): perturbed-attention guidance of single heads, as strong as wanted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dit_attn.errors import DitAttnError
from dit_attn.processors.guidance import heads
from dit_attn.processors.guidance.perturbation import JOINTS, TARGETS, Perturbation
from dit_attn.processors.methods.base import setting
from dit_attn.processors.methods.perturbed_guidance import Layers, PerturbedGuidance, middle_layer


@dataclass(frozen=True, kw_only=True)
class SoftPAG(PerturbedGuidance):
    """Guide away from perturbed heads: a head's attention matrix A becomes ``(1 - u) A + u R`` (eq. 7).

    Args:
        heads: perturbed heads, in any form of :mod:`dit_attn.processors.guidance.heads`: ``"blocks.3.attn1:0,4,7"``,
            ``"3:0-7"``, ``{(3, 0): 0.5}``, a file of ``dit-attn search``. Empty: every head of the middle layer.
        u: strength of the heads without one of their own, 0 (unchanged) to 1 (replaced, as in PAG).
        target: R, the replacement for the attention matrix: ``identity``, ``uniform`` or ``mean-query``.
        joint: meaning of the identity where image and text share a sequence. ``joint``: every row attends to itself
            alone, text too (the paper). ``image-rows``: image rows only. ``ii-logit-mask``: image rows attend to
            themselves and the text, in one softmax (diffusers' PAG pipeline for SD3). ``ii-mass-to-diagonal``: an image
            row's mass on the image moves to itself, its mass on the text stays.
        found_on: class of the transformer that the heads were found on; empty: any. A file of ``dit-attn search`` sets
            it, and must also have been made with this ``target`` and ``joint``.
        force: accept heads that were found on another model or with other settings.
    """

    slug: ClassVar[str] = "softpag"

    heads: str = setting("", "heads to perturb, e.g. 'blocks.3.attn1:0,4;blocks.5.attn1@0.5'")
    u: float = setting(1.0, "strength of the perturbation", low=0.0, high=1.0)
    target: str = setting("identity", "replacement for the attention matrix", choices=TARGETS[:3])
    joint: str = setting("joint", "meaning of the identity on a joint sequence", choices=JOINTS)
    found_on: str = setting("", "class of the transformer that the heads were found on; empty: any")
    force: bool = setting(False, "accept heads that were found on another model or with other settings")

    def __post_init__(self) -> None:
        origin = heads.origin(self.heads)
        for name in ("target", "joint"):
            other = origin.get(name, getattr(self, name))
            if other != getattr(self, name) and not self.force:
                raise DitAttnError(
                    f"the heads in {self.heads} were found with {name}={other!r}, not {getattr(self, name)!r}; set "
                    f"{name}={other!r}, or force=True to accept them all the same"
                )
        object.__setattr__(self, "found_on", self.found_on or origin.get("transformer", ""))
        object.__setattr__(self, "heads", heads.canonical(self.heads))
        super().__post_init__()

    def check_model(self, transformer: str, layers: int) -> None:
        """Refuse heads that were found on another class of transformer."""
        if self.found_on and self.found_on != transformer and not self.force:
            raise DitAttnError(
                f"these heads were found on {self.found_on}, and this model is {transformer}; search on this one, or "
                "set force=True to accept them all the same"
            )

    def perturbation(self, layers: Layers, blocks: list[str]) -> Perturbation:
        """Return the strengths of the heads, resolved on this transformer."""
        return Perturbation(
            heads.resolve(self.heads or middle_layer(layers), layers, self.u), target=self.target, joint=self.joint
        )
