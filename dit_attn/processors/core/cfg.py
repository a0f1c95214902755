"""How the pipelines of a model family do classifier-free guidance, as data."""

from __future__ import annotations

from dataclasses import dataclass, replace

CONDITIONED = ("cond", "perturbed")
"""Guidance branches whose rows have the prompt."""


@dataclass(frozen=True)
class CFGRule:
    """How a family's pipelines run classifier-free guidance.

    Attributes:
        style: ``separate`` (one transformer call per branch) or ``batched`` (branches stacked in the batch).
        order: the branches, in call order (separate) or in batch order (batched).
        longer: the batch order of runs with one more branch (guidance by reference images), ``()`` where none exist.
        negated: whether the pipelines negate the prediction before the scheduler gets it.
        rescaled: whether they rescale the guided prediction by default, which is no affine rule.
        rescaled_by: arguments of the pipeline's call that enable such a rescaling.
        scale: attribute of the pipeline with the scale of a call; ``""`` where there is none.
        argument: argument of the pipeline's call that is the scale, where no attribute stores it.
        scale_offset: what is added to it for the scale s of ``u + s (c - u)``.
        off: the largest scale that means no guidance.
        own: forward argument that marks a perturbed pass of the pipeline's own guidance, ``""`` where there is none.
        bent_by: arguments of the pipeline's call that make a step another rule than ``u + s (c - u)`` with its scale.
    """

    style: str
    order: tuple[str, ...]
    longer: tuple[str, ...] = ()
    negated: bool = False
    rescaled: bool = False
    rescaled_by: tuple[str, ...] = ()
    scale: str = "_guidance_scale"
    argument: str = ""
    scale_offset: float = 0.0
    off: float = 1.0
    own: str = ""
    bent_by: tuple[str, ...] = ()

    def scale_of(self, argument: float) -> float:
        """Return the scale s of ``u + s (c - u)`` for the value a pipeline is given; 1 is no guidance."""
        return argument + self.scale_offset if argument > self.off else 1.0

    def argument_for(self, scale: float) -> float:
        """Return the value to give a pipeline for the scale s, or for the nearest one it can guide with."""
        least = self.off + self.scale_offset
        if scale <= least:
            return self.off if scale - 1.0 <= least - scale else self.barely
        return scale - self.scale_offset

    @property
    def barely(self) -> float:
        """The smallest value that turns guidance on."""
        return self.off + 1e-4


SEPARATE = CFGRule("separate", ("cond", "uncond"))


BATCHED = CFGRule("batched", ("uncond", "cond"))


RESCALABLE = replace(BATCHED, rescaled_by=("guidance_rescale",))
