"""Base of perturbed-attention guidance: guide away from the prediction with perturbed attention.

``g = F + w (c - p)``: F is the prediction of the pipeline, with or without classifier-free guidance, c the conditional
prediction and p the conditional prediction with perturbed attention (PAG, arXiv 2403.17377, eq. 12; with single heads:
HeadHunter and SoftPAG, arXiv 2506.10978, eq. 5 and 7).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from dit_attn.errors import DitAttnError, shorten
from dit_attn.processors.core.call import AttentionCall, Request
from dit_attn.processors.guidance import heads
from dit_attn.processors.guidance.perturbation import Perturbation
from dit_attn.processors.methods.base import Method, setting

INJECTIONS = ("auto", "shift", "cond", "step")
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda t: 1.0,
    "linear": lambda t: 1.0 - t,
    "cosine": lambda t: 0.5 * (1.0 + math.cos(math.pi * t)),
}
Layers = dict[str, int | None]  # addressable layers, in order, with their number of heads


@dataclass(frozen=True, kw_only=True)
class PerturbedGuidance(Method):
    """Base of the guidance methods: one perturbed pass, over the conditional rows, is added to every guided step.

    Args:
        scale: w. 0 is bit-equal to the stock run.
        start, stop: first and last + 1 guided step, as fractions of the run.
        interval: steps from one perturbed pass to the next; the update is reused in between.
        schedule: how the scale falls over the guided steps.
        inject: where the guidance update is added: to every branch of the step (``shift``: exact for every guidance
            rule whose coefficients add up to 1), to the conditional one alone, divided by the guidance scale
            (``cond``), or to the guided prediction as the scheduler gets it (``step``). ``auto`` is ``step`` for
            pipelines that rescale the guided prediction, ``shift`` for the others.
        batched: one call with more rows instead of a second call; no block is reused then.
        share_prefix: reuse the blocks before the first perturbed one from the plain pass.
    """

    role: ClassVar[str] = "guidance"

    scale: float = setting(3.0, "guidance strength w", low=0.0)
    start: float = setting(0.0, "first guided step, as a fraction of the run", low=0.0, high=1.0)
    stop: float = setting(1.0, "last guided step + 1, as a fraction of the run", low=0.0, high=1.0)
    interval: int = setting(1, "steps from one perturbed pass to the next", low=1)
    schedule: str = setting("constant", "how the scale falls", choices=tuple(SCHEDULES))
    inject: str = setting("auto", "where the guidance update is added", choices=INJECTIONS)
    batched: bool = setting(False, "one larger call instead of two")
    share_prefix: bool = setting(True, "reuse the blocks before the first perturbed one")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not math.isfinite(self.scale):
            raise DitAttnError(f"{self.slug}.scale must be finite, got {self.scale!r}: the guidance strength w")
        if self.start >= self.stop:
            raise DitAttnError(
                f"{self.slug}: start {self.start:g} is not before stop {self.stop:g}, so no step would be guided; "
                "give a smaller start"
            )

    def request(self, call: AttentionCall, request: Request) -> None:
        """Request nothing: plain passes stay with stock attention."""

    def perturbation(self, layers: Layers, blocks: list[str]) -> Perturbation:
        """Return the perturbation of a transformer in the perturbed pass.

        Args:
            layers: its addressable layers with their number of heads.
            blocks: its blocks.

        Raises:
            DitAttnError: a layer, head or block that it does not have.
        """
        raise NotImplementedError

    def weight(self, progress: float) -> float:
        """Return the scale at ``progress`` in [0, 1) of the run, 0 outside the guided steps."""
        if not self.start <= progress < self.stop:
            return 0.0
        return self.scale * SCHEDULES[self.schedule]((progress - self.start) / (self.stop - self.start))


def as_guidance(method: Method) -> PerturbedGuidance | None:
    """Return ``method`` as a guidance method, ``None`` where it is of another kind."""
    return method if isinstance(method, PerturbedGuidance) else None


def middle_layer(layers: Layers) -> str:
    """Return the name of the layer in the middle."""
    return list(layers)[len(layers) // 2]


def block_numbers(layers: Any) -> str:
    """Return ``"7,8,9"`` for ``"7-9"``, ``[7, 8, 9]`` or ``"7,8,9"``.

    Raises:
        DitAttnError: no list of positions.
    """
    items = list(layers) if isinstance(layers, (list, tuple, range)) else [layers]
    try:
        found = heads.numbers(",".join(str(item) for item in items).replace(" ", ""))
    except ValueError:
        raise DitAttnError(f"layers {shorten(layers)} is no list of positions; write e.g. '7' or '7-9,12'") from None
    return ",".join(map(str, found))


def blocks_at(layers: str, blocks: list[str]) -> tuple[str, ...]:
    """Return the paths of the blocks at the positions ``layers``, of the middle one where it is empty.

    Raises:
        DitAttnError: no such block.
    """
    wanted = [int(part) for part in layers.split(",")] if layers else [len(blocks) // 2]
    wrong = next((number for number in wanted if number >= len(blocks)), None)
    if wrong is not None:
        raise DitAttnError(f"there is no block {wrong}: this model has blocks 0 to {len(blocks) - 1}")
    return tuple(blocks[number] for number in wanted)
