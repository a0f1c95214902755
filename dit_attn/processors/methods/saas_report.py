"""What SaaS measured in a run: the share of every piece, what was done about it, and the quality of its region."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from dit_attn.errors import shorten
from dit_attn.processors.core.regions import bounding_box

_NEGLECTED = 2.0  # a piece whose rival is ahead by this factor, in the mean over the steps


@dataclass
class PieceTrace:
    """One piece of one prompt, step by step.

    Attributes:
        piece: its text.
        sample: number of the sample.
        steps: the steps that were measured.
        shares: share of the attention that its words get in its region.
        rivals: that of what it is compared with.
        wanted: the factor that follows from them.
        factors: the factor that was applied at the next step: 1 where its region is not trusted, or nothing is applied.
        quality: of its region, in [0, 1].
        areas: of its region, share of the picture.
        box: (left, top, right, bottom) around its last region, as fractions; ``None`` for an empty one.
    """

    piece: str
    sample: int
    steps: list[int] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)
    rivals: list[float] = field(default_factory=list)
    wanted: list[float] = field(default_factory=list)
    factors: list[float] = field(default_factory=list)
    quality: list[float] = field(default_factory=list)
    areas: list[float] = field(default_factory=list)
    box: tuple[float, float, float, float] | None = None

    @property
    def ratio(self) -> float:
        """How far its rival is ahead, geometric mean over the steps."""
        pairs = [(max(b, 1e-12), max(a, 1e-12)) for a, b in zip(self.shares, self.rivals)]
        return float(torch.tensor([b / a for b, a in pairs]).log().mean().exp()) if pairs else 1.0

    @property
    def held_back(self) -> int:
        """Steps at which a lift was left out since the region is not trusted."""
        return sum(a != 1.0 and b == 1.0 for a, b in zip(self.wanted, self.factors))


@dataclass(frozen=True)
class Measured:
    """What one step measured of n pieces.

    Attributes:
        shares: (n,) share of the attention that the words get in their region.
        rivals: (n,) that of what they are compared with.
        lifts: (n,) logarithm of the factor that is applied.
        wanted: (n,) the same without the gate.
        quality: (n,) of the regions.
        masks: (n, N) bool, the regions.
    """

    shares: torch.Tensor
    rivals: torch.Tensor
    lifts: torch.Tensor
    wanted: torch.Tensor
    quality: torch.Tensor
    masks: torch.Tensor

    def columns(self) -> dict[str, torch.Tensor]:
        """Return the values of a :class:`PieceTrace`, (n,) each."""
        factors = {"wanted": self.wanted.exp(), "factors": self.lifts.exp()}
        areas = self.masks.float().mean(-1)
        return {"shares": self.shares, "rivals": self.rivals, "quality": self.quality, "areas": areas, **factors}


@dataclass
class SaaSReport:
    """What a run measured.

    Attributes:
        traces: one for every piece of every sample.
        lost: pieces whose words are not among the tokens of the text.
        applied: whether something was lifted.
        acts: whether the method was to lift what it found.
    """

    traces: list[PieceTrace] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    applied: bool = False
    acts: bool = True

    def note_lost(self, piece: str) -> None:
        """Note a piece that has no tokens."""
        if piece not in self.lost:
            self.lost.append(piece)

    def add(
        self, sample: int, step: int, pieces: Sequence[str], grid: tuple[int, int, int], measured: Measured
    ) -> None:
        """Add what one step measured of a sample."""
        self.applied |= bool(measured.lifts.any())
        for at, piece in enumerate(pieces):
            trace = self.trace(piece, sample)
            trace.steps.append(step)
            for name, values in measured.columns().items():
                getattr(trace, name).append(round(float(values[at]), 6))
            trace.box = bounding_box(measured.masks[at].cpu(), grid)

    def trace(self, piece: str, sample: int) -> PieceTrace:
        """Return the trace of a piece of a sample, a new one where there is none."""
        for found in self.traces:
            if (found.piece, found.sample) == (piece, sample):
                return found
        self.traces.append(PieceTrace(piece, sample))
        return self.traces[-1]

    @property
    def neglected(self) -> list[PieceTrace]:
        """Pieces whose rival is ahead, the most neglected first."""
        return sorted((one for one in self.traces if one.ratio > _NEGLECTED), key=lambda one: -one.ratio)

    @property
    def warnings(self) -> list[str]:
        """What a user should know."""
        held = [one for one in self.traces if one.held_back and self.acts]
        found = [
            f"saas did not lift {shorten(one.piece)} at {one.held_back} of {len(one.steps)} steps: the region found "
            f"for it is not reliable (quality {sum(one.quality) / len(one.quality):.2f}); min_quality sets the limit"
            for one in held
        ]
        return found + [
            f"saas left out {shorten(piece)}: its words are not among the text's tokens" for piece in self.lost
        ]

    def figures(self) -> dict[str, Any]:
        """Return means over the steps, for tables: of every piece its share, ratio, factor and quality."""

        def mean(values: Sequence[float]) -> float:
            return round(sum(values) / max(1, len(values)), 4)

        return {
            "pieces": [
                {"piece": one.piece, "sample": one.sample, "share": mean(one.shares), "ratio": round(one.ratio, 3),
                 "factor": mean(one.factors), "quality": mean(one.quality), "area": mean(one.areas), "box": one.box}
                for one in self.traces
            ]
        }  # fmt: skip

    def __str__(self) -> str:
        if not self.traces:
            return "nothing was measured: no step, layer or piece of the prompt"
        lines = []
        for one in self.traces:
            share, mean = (sum(values) / len(values) for values in (one.shares, one.factors))
            lift = f"; lifted {mean:.2f} x in the mean of {len(one.steps)} steps" if self.acts else ""
            lines.append(
                f"{shorten(one.piece)}: {100 * share:.2f} % of the attention, its rival {one.ratio:.2f} x as much{lift}"
            )
        return "\n".join(lines)
