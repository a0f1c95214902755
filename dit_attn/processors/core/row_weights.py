"""Weights of the cells of a picture, and the words that they are for: what re-weighting is given at every step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from dit_attn.errors import DitAttnError
from dit_attn.processors.core.tokens import Tokens

Grid = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class RowWeights:
    """How much more the cells of a picture are to attend to a concept.

    Attributes:
        weights: (N|1, H, W) above 0, of every sample; 1 changes nothing.
        columns: (N|1, L) bool, which tokens of the text are the concept; ``None``: all.
        region: (N|1, H, W) bool, where the concept belongs; ``None``: where a weight is not 1.

    Raises:
        DitAttnError: shapes that do not fit, or weights that are not finite and above 0.
    """

    weights: torch.Tensor
    columns: torch.Tensor | None = None
    region: torch.Tensor | None = None

    def __post_init__(self) -> None:
        weights = self.weights
        if weights.ndim != 3 or not bool((weights > 0).all() & weights.isfinite().all()):
            raise DitAttnError(
                f"weights must be (samples, height, width), finite and above 0, got {tuple(weights.shape)} from "
                f"{float(weights.min()):g} to {float(weights.max()):g}"
            )
        for name, ndim in (("columns", 2), ("region", 3)):
            given = getattr(self, name)
            if given is not None and (given.ndim != ndim or given.dtype != torch.bool):
                raise DitAttnError(f"{name} must be bool of {ndim} dimensions, got {given.dtype} {tuple(given.shape)}")

    def rows(self, samples: Sequence[int], grid: Grid) -> torch.Tensor:
        """Return the weights of the tokens of some samples, (n, T * H * W) fp32.

        Args:
            samples: their numbers.
            grid: (T, H, W) tokens; cells are averaged where it is another one.
        """
        cells = torch.stack([self._of(self.weights, number) for number in samples]).float()
        return _on_grid(cells, grid)

    def inside(self, samples: Sequence[int], grid: Grid) -> torch.Tensor:
        """Return which tokens of some samples the region touches, (n, T * H * W) bool."""
        region = self.weights != 1 if self.region is None else self.region
        cells = torch.stack([self._of(region, number) for number in samples]).float()
        return _on_grid(cells, grid) > 0

    def words(self, samples: Sequence[int], length: int) -> torch.Tensor:
        """Return which of ``length`` text tokens are the concept, (n, length) bool.

        Raises:
            DitAttnError: the columns are of a longer text.
        """
        if self.columns is None:
            return torch.ones(len(samples), length, dtype=torch.bool)
        missing = length - self.columns.shape[1]
        if missing < 0:
            raise DitAttnError(
                f"the columns are of a text of {self.columns.shape[1]} tokens, and this one has {length}; give one for "
                "every token of the text"
            )
        return F.pad(torch.stack([self._of(self.columns, number) for number in samples]), (0, missing))

    def _of(self, values: torch.Tensor, number: int) -> torch.Tensor:
        if len(values) == 1:
            return values[0].cpu()
        if number >= len(values):
            raise DitAttnError(f"weights are of {len(values)} samples, and the run has more; give one or all")
        return values[number].cpu()


def text_tokens(tokens: Tokens) -> torch.Tensor:
    """Return the places of the text in a joint sequence, in order."""
    places = [torch.arange(span.start, span.stop) for span in tokens.spans if span.kind == "text"]
    return torch.cat(places) if places else torch.zeros(0, dtype=torch.long)


def _on_grid(cells: torch.Tensor, grid: Grid) -> torch.Tensor:
    frames, height, width = grid
    if cells.shape[1:] != (height, width):
        cells = F.interpolate(cells[:, None], (height, width), mode="area")[:, 0]
    return cells[:, None].expand(-1, frames, -1, -1).reshape(len(cells), math.prod(grid))
