"""Find regions in maps of attention: blur, Otsu's threshold, and how far the regions that come out can be trusted."""

from __future__ import annotations

import torch
import torch.nn.functional as F

LEVELS = 256


def gaussian_blur(maps: torch.Tensor, sigma: float) -> torch.Tensor:
    """Blur maps (..., H, W) with a Gaussian of ``sigma`` tokens, cut off at three sigmas; 0 outside of the map."""
    if sigma <= 0.0:
        return maps
    radius = round(3 * sigma)
    steps = torch.arange(-radius, radius + 1, dtype=maps.dtype, device=maps.device)
    kernel = torch.exp(-(steps**2) / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    flat = maps.reshape(-1, 1, *maps.shape[-2:])
    flat = F.conv2d(F.conv2d(flat, kernel[None, None, None], padding=(0, radius)), kernel[None, None, :, None],
                    padding=(radius, 0))  # fmt: skip
    return flat.reshape(maps.shape)


def normalized(maps: torch.Tensor) -> torch.Tensor:
    """Return maps (n, N) in [0, 1], each from its smallest to its largest value."""
    low, high = maps.amin(-1, keepdim=True), maps.amax(-1, keepdim=True)
    return (maps - low) / (high - low + 1e-8)


def otsu_threshold(levels: torch.Tensor) -> int:
    """Return the level that separates two classes best: those up to it and those above (Otsu 1979).

    Args:
        levels: integers in [0, 255].

    Returns:
        The lowest level with the largest variance between the classes; 0 where all are equal.
    """
    counts = torch.bincount(levels.flatten().cpu().long(), minlength=LEVELS).double()
    values = torch.arange(LEVELS, dtype=torch.float64)
    below = counts.cumsum(0)
    above = below[-1] - below
    sums = (counts * values).cumsum(0)
    means = sums / below.clamp(min=1.0), (sums[-1] - sums) / above.clamp(min=1.0)
    between = below * above * (means[0] - means[1]) ** 2
    return int(between.argmax()) if bool(between.max() > 0) else 0


def region_masks(
    maps: torch.Tensor, grid: tuple[int, int, int], sigma: float = 1.0, threshold: float | None = None
) -> torch.Tensor:
    """Return where maps are high, (n, N) bool; nowhere where a map is constant.

    Args:
        maps: (n, N), N = T * H * W.
        grid: (T, H, W).
        sigma: of the blur within every frame, in tokens.
        threshold: of the blurred map, normalized to [0, 1]; default: Otsu's of 256 levels.
    """
    scaled = normalized(gaussian_blur(maps.float().reshape(len(maps), *grid), sigma).flatten(1))
    if threshold is not None:
        return (scaled >= threshold) & (scaled.amax(-1, keepdim=True) > 0)
    levels = (scaled * (LEVELS - 1)).to(torch.uint8)
    return torch.stack([row > otsu_threshold(row) for row in levels]) if len(levels) else levels.bool()


def overlap_ratio(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the intersection over the union of masks (n, N) bool, row by row, (n,); 0 where both are empty."""
    both, either = (a & b).sum(-1), (a | b).sum(-1)
    return both / either.clamp(min=1)


def mask_quality(masks: torch.Tensor, before: torch.Tensor | None = None) -> torch.Tensor:
    """Return how far every mask can be trusted, (n,) in [0, 1].

    The product of two shares that need no knowledge of the picture: the part of a mask that no other mask has, since
    pieces that are attended to in the same places have no region of their own, and the overlap with the mask that was
    found before, since a region that is real stays.

    Args:
        masks: (n, N) bool.
        before: (n, N) bool, the masks of the step before; without them only the first share counts.
    """
    others = masks.long().sum(0) - masks.long() > 0
    size = masks.sum(-1).clamp(min=1)
    own = torch.where(masks.any(-1), (masks & ~others).sum(-1) / size, torch.zeros(len(masks), device=masks.device))
    return own if before is None else own * overlap_ratio(masks, before)


def masked_mean(maps: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Return the mean of every map (n, N) over its mask (n, N) bool, (n,); 0 for an empty mask."""
    return (maps * masks).sum(-1) / masks.sum(-1).clamp(min=1)
