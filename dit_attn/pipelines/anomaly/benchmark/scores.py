"""Score maps of defects: average precision and AUROC of pixels, AUROC of images, per-region overlap."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from scipy import integrate, ndimage

PRO_LIMIT = 0.3  # false-positive rate up to which the overlap is integrated


def score_maps(maps: torch.Tensor, masks: torch.Tensor) -> dict[str, float]:
    """Score maps against masks; the larger, the better.

    Args:
        maps: (N, H, W) in [0, 1].
        masks: (N, H, W) bool; empty for normal images. Some are, some are not.
    """
    from torchmetrics.functional.classification import binary_auroc, binary_average_precision

    labels = masks.any(-1).any(-1).long()
    pixels, truth = maps.flatten(), masks.flatten().long()
    return {
        "pixel_ap": float(binary_average_precision(pixels, truth)),
        "pro": per_region_overlap(maps.numpy(), masks.numpy()),
        "pixel_auroc": float(binary_auroc(pixels, truth)),
        "image_auroc": float(binary_auroc(image_scores(maps), labels)),
    }


def image_scores(maps: torch.Tensor) -> torch.Tensor:
    """Return the highest mean over a window of each map, (N,); the window is a twelfth of a side wide."""
    side = max(3, maps.shape[-1] // 12 | 1)
    smooth = F.avg_pool2d(maps[:, None], side, 1, side // 2, count_include_pad=False)
    return smooth.flatten(1).amax(1)


def per_region_overlap(maps: np.ndarray, masks: np.ndarray, limit: float = PRO_LIMIT) -> float:
    """Integrate the mean covered share of the 8-connected regions over the false-positive rate, divided by ``limit``.

    (Bergmann et al., MVTec AD, IJCV 2021.)

    Args:
        maps: (N, H, W).
        masks: (N, H, W) bool.
        limit: rate up to which is integrated.
    """
    regions = []
    for score, mask in zip(maps, masks):
        labels, count = ndimage.label(mask, np.ones((3, 3)))
        regions += [np.sort(score[labels == index + 1]) for index in range(count)]
    wrong = np.sort(maps[~masks])
    grid = np.linspace(1 - limit, 1, 201)
    thresholds = np.unique(np.append(np.quantile(wrong, grid, method="lower"), -np.inf))
    rate = np.array([1 - np.searchsorted(wrong, t, "right") / len(wrong) for t in thresholds])
    overlap = np.array(
        [np.mean([1 - np.searchsorted(one, t, "right") / len(one) for one in regions]) for t in thresholds]
    )
    rate, overlap = np.append(0.0, rate[::-1]), np.append(0.0, overlap[::-1])  # the curve begins at nothing found
    keep = rate <= limit
    end = np.interp(limit, rate, overlap)
    return float(integrate.trapezoid(np.append(overlap[keep], end), np.append(rate[keep], limit)) / limit)


def area_above(maps: torch.Tensor, masks: torch.Tensor) -> float:
    """Return the pixel AUROC of maps for telling the pixels of masks from the others."""
    from torchmetrics.functional.classification import binary_auroc

    return float(binary_auroc(maps.flatten(), masks.flatten().long()))
