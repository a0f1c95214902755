"""One step of SaaS (arXiv 2507.16240) by the rule of its published code, written from its description, without ours.

The code keeps full attention matrices. At a step t it multiplies the weights of the region's rows to the words of every
piece by the factor that step t - 1 measured, normalizes every row again, and measures what comes out: maps of the
words and of the first input image, the mean over the heads and summed over the layers. The map of a piece is blurred by
7 x 7 taps, brought to [0, 255] by its smallest and largest value, cut down to integers, and split by Otsu's threshold;
the factor is the image's sum over the region by that of the words.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch


@dataclass
class ReleasedSaaS:
    """The state between two steps.

    Attributes:
        words: keys of every piece.
        image: keys of the input image.
        rows: the latent rows, of a grid (height, width).
        grid: (height, width).
        strength: s.
        masks, factors: what the last step measured.
    """

    words: Sequence[Sequence[int]]
    image: slice
    rows: slice
    grid: tuple[int, int]
    strength: float = 1.0
    masks: list[torch.Tensor] = field(default_factory=list)
    factors: list[float] = field(default_factory=list)

    def step(self, layers: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the attention matrices (H, S, Sk) of a step's layers with the factors, and measure them."""
        out = [self._scaled(matrix) for matrix in layers]
        total = torch.stack([matrix[:, self.rows].mean(0) for matrix in out]).sum(0)  # (N, Sk)
        pieces = [total[:, list(keys)].sum(1) for keys in self.words]
        image = total[:, self.image].sum(1)
        self.masks = [released_region(piece, self.grid) for piece in pieces]
        self.factors = [
            self.strength * float(image[mask].sum()) / (float(piece[mask].sum()) + 1e-6)
            for piece, mask in zip(pieces, self.masks, strict=True)
        ]
        return out

    def _scaled(self, matrix: torch.Tensor) -> torch.Tensor:
        matrix = matrix.clone()
        for keys, mask, factor in zip(self.words, self.masks, self.factors):
            at = self.rows.start + mask.nonzero().flatten()
            matrix[:, at[:, None], torch.tensor(keys)] *= factor
        return matrix / matrix.sum(-1, keepdim=True)


def released_region(piece: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Return where a map (N,) of a grid (height, width) is high, (N,) bool."""
    height, width = grid
    taps = [math.exp(-(x**2) / 2.0) for x in range(-3, 4)]
    kernel = torch.tensor([[a * b for b in taps] for a in taps], dtype=torch.float32) / sum(taps) ** 2
    padded = torch.zeros(height + 6, width + 6)
    padded[3:-3, 3:-3] = piece.float().reshape(grid)
    blurred = sum(kernel[y, x] * padded[y : y + height, x : x + width] for y in range(7) for x in range(7))
    assert isinstance(blurred, torch.Tensor)
    low, high = float(blurred.min()), float(blurred.max())
    levels = [int(255 * (value - low) / (high - low + 1e-8)) for value in blurred.flatten().tolist()]
    return torch.tensor(levels) > released_otsu(levels)


def released_otsu(levels: Sequence[int]) -> int:
    """Return the level whose two classes, up to it and above it, differ most between each other."""
    best, chosen = 0.0, 0
    for level in range(256):
        below, above = [x for x in levels if x <= level], [x for x in levels if x > level]
        if below and above:
            apart = sum(below) / len(below) - sum(above) / len(above)
            between = len(below) * len(above) * apart**2
            if between > best * (1 + 1e-12):
                best, chosen = between, level
    return chosen


def released_split(tokens: Sequence[str], start: int, suffix: int) -> list[tuple[int, int]]:
    """Return the pieces of a tokenized prompt, (start, stop) in tokens.

    The first one begins at ``start``; every comma ends one, and the next begins two tokens later, so that the comma and
    the word behind it belong to none; the last one ends ``suffix`` tokens before the end.
    """
    commas = [at for at in range(start, len(tokens) - suffix) if tokens[at] == ","]
    starts = [start, *(at + 2 for at in commas)]
    return list(zip(starts, [*commas, len(tokens) - suffix]))
