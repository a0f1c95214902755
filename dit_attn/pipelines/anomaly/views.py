"""The part of an image that the model sees: a crop around the mask, at the model's size, and the way back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage

_ROOM = 1.8  # side of a crop over that of the mask's box
_WHOLE = 1.3  # an image up to this much larger than the model's size is seen entirely


@dataclass(frozen=True)
class View:
    """A box of an image, in pixels.

    Attributes:
        top, left, height, width: of the box.
        size: height and width at which the model sees it.
    """

    top: int
    left: int
    height: int
    width: int
    size: int

    @property
    def box(self) -> tuple[slice, slice]:
        """Rows and columns."""
        return slice(self.top, self.top + self.height), slice(self.left, self.left + self.width)

    def image(self, pixels: np.ndarray) -> torch.Tensor:
        """Return the view of an image (H, W, 3) uint8 as (3, size, size) in [0, 1]."""
        part = torch.from_numpy(np.ascontiguousarray(pixels[self.box])).permute(2, 0, 1).float() / 255
        if part.shape[1:] == (self.size, self.size):
            return part
        out = F.interpolate(part[None], (self.size, self.size), mode="bicubic", antialias=True, align_corners=False)
        return out[0].clamp(0, 1)

    def mask(self, mask: np.ndarray) -> torch.Tensor:
        """Return the view of a mask (H, W) bool as (1, size, size) in {0, 1}: 1 wherever it is touched."""
        part = torch.from_numpy(np.ascontiguousarray(mask[self.box])).float()[None, None]
        if part.shape[2:] == (self.size, self.size):
            return part[0]
        shrinks = self.size <= min(self.height, self.width)
        out = F.adaptive_max_pool2d(part, self.size) if shrinks else F.interpolate(part, (self.size, self.size))
        return out[0]

    def paste(self, painted: torch.Tensor, pixels: np.ndarray, mask: np.ndarray, feather: int = 3) -> np.ndarray:
        """Paste what was painted into an image; beyond ``feather`` pixels around the mask no byte changes.

        Args:
            painted: (3, size, size) in [0, 1].
            pixels: (H, W, 3) uint8, the normal image.
            mask: (H, W) bool.
            feather: pixels around the mask over which the two are mixed.
        """
        if painted.shape[1:] != (self.height, self.width):
            painted = F.interpolate(
                painted[None], (self.height, self.width), mode="bicubic", antialias=True, align_corners=False
            )[0].clamp(0, 1)
        distance = ndimage.distance_transform_edt(~mask)[self.box]
        weight = np.clip(1 - distance / (feather + 1), 0, 1)[..., None]
        weight[distance > feather] = 0
        part = pixels[self.box].astype(np.float64)
        fresh = painted.permute(1, 2, 0).double().cpu().numpy() * 255
        out = pixels.copy()
        mixed = np.clip(np.round(part + weight * (fresh - part)), 0, 255).astype(np.uint8)
        out[self.box] = np.where(weight > 0, mixed, pixels[self.box])
        return out


def view_of(mask: np.ndarray, size: int, crop: str = "auto", rng: np.random.Generator | None = None) -> View:
    """Choose the view of an image by its mask.

    Args:
        mask: (H, W) bool, not empty.
        size: pixels at which the model works.
        crop: ``"none"`` for the entire image, ``"auto"`` for a crop around the mask where the image is larger than the
            model's size.
        rng: moves and scales the crop, as far as the mask stays in it; ``None`` centers it.
    """
    height, width = mask.shape
    if crop == "none" or max(height, width) <= _WHOLE * size:
        return View(0, 0, height, width, size)
    rows, columns = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
    box = max(np.ptp(rows), np.ptp(columns)) + 1
    side = max(size, _ROOM * box) * (rng.uniform(0.9, 1.25) if rng is not None else 1.0)
    h, w = (int(min(round(side), length)) for length in (height, width))
    tops, lefts = (
        _span(low[0], low[-1], length, total, rng) for low, length, total in ((rows, h, height), (columns, w, width))
    )
    return View(tops, lefts, h, w, size)


def _span(first: int, last: int, length: int, total: int, rng: np.random.Generator | None) -> int:
    """Where a crop of ``length`` begins: the range from ``first`` to ``last`` in its middle, or at random inside it."""
    low, high = max(0, last - length + 1), min(first, total - length)
    if rng is None or high <= low:
        return int(np.clip((first + last + 1 - length) // 2, 0, total - length))
    return int(rng.integers(low, high + 1))


def flipped(images: Sequence[np.ndarray], flips: str, rng: np.random.Generator) -> list[np.ndarray]:
    """Mirror images, (H, W, ...), all alike, each way with a probability of a half.

    Args:
        images: an image and its mask, or one of them.
        flips: ``"both"``, ``"horizontal"`` or ``"none"``.
        rng: random numbers.
    """
    across, over = rng.uniform(size=2) < 0.5
    out = list(images)
    if flips in ("both", "horizontal") and across:
        out = [image[:, ::-1] for image in out]
    if flips == "both" and over:
        out = [image[::-1] for image in out]
    return out
