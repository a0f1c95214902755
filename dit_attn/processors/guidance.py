"""Guidance by a perturbed pass: a push away from what the model predicts when some of its attention is spoiled.

``g = F + w (c - p)``: F is what the pipeline would have made, with or without classifier-free guidance, c the
conditional prediction and p the same with perturbed attention (PAG, Ahn et al. 2024, eq. 12; with single heads:
HeadHunter and SoftPAG, Ahn et al. 2025, eq. 5 and 7).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from dit_attn.errors import DitAttnError
from dit_attn.processors import heads
from dit_attn.processors.method import Method, setting
from dit_attn.processors.perturb import JOINTS, TARGETS, Perturbation

if TYPE_CHECKING:
    from dit_attn.processors.executor import AttentionCall, Request

INJECTIONS = ("auto", "shift", "cond", "step")
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda t: 1.0,
    "linear": lambda t: 1.0 - t,
    "cosine": lambda t: 0.5 * (1.0 + math.cos(math.pi * t)),
}
Layers = dict[str, int | None]  # addressable layers, in order, with their number of heads


@dataclass(frozen=True)
class PerturbedGuidance(Method):
    """Base of the guidance methods. One perturbed pass, over the conditional rows, is added to every guided step.

    Args:
        scale: w. 0 leaves the run as it is, to the bit.
        start, stop: first and last + 1 guided step, as fractions of the run.
        interval: a perturbed pass every so many steps; the push is used again in between.
        schedule: how the scale falls over the guided steps.
        inject: where the push is added: to every branch of the step (``shift``: exact for every guidance rule whose
            coefficients add up to 1), to the conditional one alone, divided by the guidance scale (``cond``), or to the
            guided prediction as the scheduler gets it (``step``). ``auto`` is ``step`` for pipelines that rescale the
            guided prediction, ``shift`` for the others.
        batched: one call with more rows instead of a second call; no block is shared then.
        share_prefix: do not run the blocks before the first perturbed one again.
    """

    role: ClassVar[str] = "guidance"

    scale: float = setting(3.0, "strength w of the push", low=0.0)
    start: float = setting(0.0, "first guided step, as a fraction of the run", low=0.0, high=1.0)
    stop: float = setting(1.0, "last guided step + 1, as a fraction of the run", low=0.0, high=1.0)
    interval: int = setting(1, "steps from one perturbed pass to the next", low=1)
    schedule: str = setting("constant", "how the scale falls", choices=tuple(SCHEDULES))
    inject: str = setting("auto", "where the push is added", choices=INJECTIONS)
    batched: bool = setting(False, "one larger call instead of two")
    share_prefix: bool = setting(True, "take over the blocks before the first perturbed one")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not math.isfinite(self.scale):
            raise DitAttnError(f"{self.slug}.scale must be finite, got {self.scale!r}: the strength w of the push")
        if self.start >= self.stop:
            raise DitAttnError(
                f"{self.slug}: start {self.start:g} is not before stop {self.stop:g}, so no step would be guided; "
                "give a smaller start"
            )

    def request(self, call: AttentionCall, request: Request) -> None:
        """Nothing: plain passes are left alone."""

    def perturbation(self, layers: Layers, blocks: list[str]) -> Perturbation:
        """What the perturbed pass does to a transformer.

        Args:
            layers: its addressable layers with their number of heads.
            blocks: its blocks.

        Raises:
            DitAttnError: a layer, head or block that it does not have.
        """
        raise NotImplementedError

    def weight(self, progress: float) -> float:
        """The scale at ``progress`` in [0, 1) of the run, 0 outside the guided steps."""
        if not self.start <= progress < self.stop:
            return 0.0
        return self.scale * SCHEDULES[self.schedule]((progress - self.start) / (self.stop - self.start))


@dataclass(frozen=True)
class SoftPAG(PerturbedGuidance):
    """Per-head perturbed-attention guidance: a head's map becomes ``(1 - u) A + u R``, at the cost of a blend.

    Args:
        heads: which heads, in any form of :mod:`dit_attn.processors.heads`: ``"blocks.3.attn1:0,4,7"``, ``"3:0-7"``,
            ``{(3, 0): 0.5}``, a file of ``dit-attn search``. Empty: every head of the middle layer.
        u: strength of the heads that name none, 0 (unchanged) to 1 (replaced, as in PAG).
        target: R: ``identity``, ``uniform``, ``mean-query`` or ``blurred-query``.
        joint: what the identity means where picture and text share a sequence. ``joint``: every row reads itself alone,
            text too (the paper). ``image-rows``: only picture rows. ``ii-logit-mask``: picture rows read themselves and
            the text, one softmax (diffusers' PAG pipeline for SD3). ``ii-mass-to-diagonal``: a picture row's mass on
            the picture goes to itself, its mass on the text stays.
        found_on: class of the transformer that the heads were found on; empty: any. A file of ``dit-attn search`` sets
            it, and must also have been made with this ``target`` and ``joint``.
        force: take such a file whatever it was found on.
    """

    slug: ClassVar[str] = "softpag"

    heads: str = setting("", "heads to perturb, e.g. 'blocks.3.attn1:0,4;blocks.5.attn1@0.5'")
    u: float = setting(1.0, "strength of the perturbation", low=0.0, high=1.0)
    target: str = setting("identity", "what takes the place of the map", choices=TARGETS[:3])
    joint: str = setting("joint", "what the identity means on a joint sequence", choices=JOINTS)
    found_on: str = setting("", "class of the transformer that the heads were found on; empty: any")
    force: bool = setting(False, "take heads that were found on another model or convention")

    def __post_init__(self) -> None:
        origin = heads.origin(self.heads)
        for name in ("target", "joint"):
            other = origin.get(name, getattr(self, name))
            if other != getattr(self, name) and not self.force:
                raise DitAttnError(
                    f"the heads in {self.heads} were found with {name}={other!r}, not {getattr(self, name)!r}; set "
                    f"{name}={other!r}, or force=True to take them all the same"
                )
        object.__setattr__(self, "found_on", self.found_on or origin.get("transformer", ""))
        object.__setattr__(self, "heads", heads.canonical(self.heads))
        super().__post_init__()

    def check_model(self, transformer: str, layers: int) -> None:
        """See the base class."""
        if self.found_on and self.found_on != transformer and not self.force:
            raise DitAttnError(
                f"these heads were found on {self.found_on}, and this model is {transformer}; search on this one, or "
                "set force=True to take them all the same"
            )

    def perturbation(self, layers: Layers, blocks: list[str]) -> Perturbation:
        """See the base class."""
        return Perturbation(
            heads.resolve(self.heads or _middle(layers), layers, self.u), target=self.target, joint=self.joint
        )


@dataclass(frozen=True)
class SEG(PerturbedGuidance):
    """Smoothed-energy guidance (Hong 2024): attention of queries that a Gaussian has blurred within their frame.

    Args:
        heads: as for :class:`SoftPAG`.
        sigma: width of the blur in tokens; above 9999 it is the mean over all frames of the picture.
    """

    slug: ClassVar[str] = "seg"

    heads: str = setting("", "heads to perturb; empty: the middle layer")
    u: float = setting(1.0, "strength of the perturbation", low=0.0, high=1.0)
    sigma: float = setting(10_000.0, "standard deviation of the query blur, in tokens", low=0.0)

    def __post_init__(self) -> None:
        object.__setattr__(self, "heads", heads.canonical(self.heads))
        super().__post_init__()

    def perturbation(self, layers: Layers, blocks: list[str]) -> Perturbation:
        """See the base class."""
        strengths = heads.resolve(self.heads or _middle(layers), layers, self.u)
        return Perturbation(strengths, target="blurred-query", joint="image-rows", sigma=self.sigma)


@dataclass(frozen=True)
class SLG(PerturbedGuidance):
    """Skip-layer guidance: the perturbed pass leaves whole blocks out (settings of the SD3.5 reference).

    Args:
        layers: positions of the skipped blocks, e.g. ``"7-9"``; empty: the middle block.
    """

    slug: ClassVar[str] = "slg"

    scale: float = setting(2.8, "strength w of the push", low=0.0)
    start: float = setting(0.01, "first guided step, as a fraction of the run", low=0.0, high=1.0)
    stop: float = setting(0.2, "last guided step + 1, as a fraction of the run", low=0.0, high=1.0)
    layers: str = setting("", "blocks to skip, e.g. '7-9'; empty: the middle one")

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", _numbers(self.layers))
        super().__post_init__()
        if self.batched:
            raise DitAttnError("slg skips blocks for the perturbed rows alone, which one call cannot; drop batched")

    def perturbation(self, layers: Layers, blocks: list[str]) -> Perturbation:
        """See the base class."""
        return Perturbation({}, skipped=_blocks_at(self.layers, blocks))


@dataclass(frozen=True)
class STG(PerturbedGuidance):
    """Spatiotemporal skip guidance (Hyung et al. 2024), made for clips.

    Args:
        layers: positions of the blocks, e.g. ``"11"``; empty: the middle one.
        mode: ``attention``: their self-attention becomes the identity; ``residual``: the blocks are left out.
    """

    slug: ClassVar[str] = "stg"

    scale: float = setting(1.0, "strength w of the push", low=0.0)
    layers: str = setting("", "blocks to perturb, e.g. '11'; empty: the middle one")
    mode: str = setting("attention", "what is left out", choices=("attention", "residual"))

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", _numbers(self.layers))
        super().__post_init__()
        if self.batched and self.mode == "residual":
            raise DitAttnError("stg skips blocks for the perturbed rows alone, which one call cannot; drop batched")

    def perturbation(self, layers: Layers, blocks: list[str]) -> Perturbation:
        """See the base class."""
        wanted = _blocks_at(self.layers, blocks)
        if self.mode == "residual":
            return Perturbation({}, skipped=wanted)
        inside = [layer for layer in layers if any(layer.startswith(f"{name}.") for name in wanted)]
        if not inside:
            raise DitAttnError(f"block {wanted[0]} has no self-attention to perturb; choose another layer")
        return Perturbation(heads.resolve(";".join(inside), layers, 1.0))


def _middle(layers: Layers) -> str:
    return list(layers)[len(layers) // 2]


def _numbers(layers: Any) -> str:
    """``"7-9"`` of 7-9, ``[7, 8, 9]`` or ``"7,8,9"``, as ``"7,8,9"``."""
    items = list(layers) if isinstance(layers, (list, tuple, range)) else [layers]
    try:
        found = heads.numbers(",".join(str(item) for item in items).replace(" ", ""))
    except ValueError:
        raise DitAttnError(f"layers {layers!r} cannot be read; write positions such as '7' or '7-9,12'") from None
    return ",".join(map(str, found))


def _blocks_at(layers: str, blocks: list[str]) -> tuple[str, ...]:
    """Paths of the blocks at the positions ``layers``."""
    wanted = [int(part) for part in layers.split(",")] if layers else [len(blocks) // 2]
    wrong = next((number for number in wanted if number >= len(blocks)), None)
    if wrong is not None:
        raise DitAttnError(f"there is no block {wrong}: this model has blocks 0 to {len(blocks) - 1}")
    return tuple(blocks[number] for number in wanted)
