"""What subject isolation knows in a run: regions that are looked for, and how much subjects attend to each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from dit_attn.errors import shorten
from dit_attn.processors.core.piece_maps import PieceMaps, Spoken
from dit_attn.processors.core.region_maps import gaussian_blur, mask_quality, normalized, region_masks
from dit_attn.processors.core.regions import bounding_box


@dataclass
class RegionSearch(PieceMaps):
    """Maps of the words of one sample's subjects over the steps in which their regions are looked for.

    Attributes:
        step: the step that is being measured.
        total: (n, N), sum over the steps before it.
    """

    step: int = -1
    total: torch.Tensor | None = None

    def begin_step(self, step: int) -> None:
        """Add up what the last step measured, and begin another one."""
        if step != self.step and self.layers:
            self.masks = region_masks(self.mass, self.grid)
            self.total = self.mass if self.total is None else self.total + self.mass
            self.clear()
        self.step = step

    def result(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the regions (n, N) bool, their quality (n,), and weights (n, N) that say whose a token is."""
        self.begin_step(-1)
        assert self.total is not None
        masks = region_masks(self.total, self.grid)
        weights = normalized(gaussian_blur(self.total.reshape(len(self.total), *self.grid), 1.0).flatten(1))
        return masks, mask_quality(masks, self.masks), weights


@dataclass
class IsolationState:
    """What a run knows.

    Attributes:
        searches: by sample.
        spoken: words of the subjects in calls, by shapes.
        regions: (n, N) bool by sample; without an entry, the regions that are given.
        done: whether the search is over.
    """

    searches: dict[int, RegionSearch] = field(default_factory=dict)
    spoken: dict[Any, Spoken] = field(default_factory=dict)
    regions: dict[int, torch.Tensor] = field(default_factory=dict)
    done: bool = False


@dataclass
class FoundRegion:
    """A region that was looked for.

    Attributes:
        piece: the subject.
        sample: number of the sample.
        quality: of the region, in [0, 1].
        used: whether it is good enough.
        box: (left, top, right, bottom) around it, as fractions; ``None`` where it is empty.
    """

    piece: str
    sample: int
    quality: float
    used: bool
    box: tuple[float, float, float, float] | None


@dataclass
class IsolationReport:
    """What isolation found and measured in a run.

    Attributes:
        pieces: the subjects.
        found: regions that were looked for.
        limit: the quality that they need.
        word_sums, region_sums: sums of :attr:`words` and :attr:`regions` over the layers and steps.
        counts: how many.
    """

    pieces: list[str] = field(default_factory=list)
    found: list[FoundRegion] = field(default_factory=list)
    limit: float = 0.0
    word_sums: list[list[float]] = field(default_factory=list)
    region_sums: list[list[float]] = field(default_factory=list)
    counts: list[int] = field(default_factory=lambda: [0, 0])

    def add_found(
        self, sample: int, pieces: Sequence[str], masks: torch.Tensor, quality: torch.Tensor, grid: tuple[int, int, int]
    ) -> None:
        """Add the regions of one sample."""
        for piece, mask, value in zip(pieces, masks, quality.tolist()):
            box = bounding_box(mask, grid)
            self.found.append(FoundRegion(piece, sample, round(value, 4), value >= self.limit, box))

    def add(self, what: int, matrix: torch.Tensor) -> None:
        """Add a layer's attention of n regions to n words (0) or n regions (1)."""
        name = ("word_sums", "region_sums")[what]
        known = getattr(self, name)
        setattr(self, name, (matrix + torch.tensor(known)).tolist() if known else matrix.tolist())
        self.counts[what] += 1

    @property
    def words(self) -> list[list[float]]:
        """Leakage: share of the attention that the rows of region i give to the words of subject j; [i][j]."""
        return [[round(x / self.counts[0], 6) for x in row] for row in self.word_sums]

    @property
    def regions(self) -> list[list[float]]:
        """The same to the region of subject j."""
        return [[round(x / self.counts[1], 6) for x in row] for row in self.region_sums]

    @property
    def warnings(self) -> list[str]:
        """What a user should know."""
        return [
            f"isolation found no reliable region for {shorten(one.piece)} (quality {one.quality:.2f}, at least "
            f"{self.limit:g} is needed): sample {one.sample} ran without isolation; give it a box"
            for one in self.found
            if not one.used
        ]

    def figures(self) -> dict[str, Any]:
        """Return the leakage and the quality of what was found, for tables."""
        found = [{"piece": one.piece, "quality": one.quality, "used": one.used} for one in self.found]
        return {"words": self.words, "regions": self.regions, "found": found}

    def __str__(self) -> str:
        lines = [f"{shorten(one.piece)}: found with quality {one.quality:.2f}" for one in self.found]
        for name, matrix in (("words", self.words), ("regions", self.regions)):
            for piece, row in zip(self.pieces, matrix):
                shares = ", ".join(f"{100 * x:.2f} %" for x in row)
                lines.append(f"{shorten(piece)} attends to the {name} of all subjects by {shares}")
        return "\n".join(lines) or "no region was looked for"
