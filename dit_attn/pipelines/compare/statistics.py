"""Score single items (PSNR, SSIM, captions, saturation) and average scores with bootstrap and jackknife intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dit_attn.errors import DitAttnError

RESAMPLES = 2000
BLOCKS = 50  # of the jackknife


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Return the peak signal-to-noise ratio in dB of two uint8 arrays of one shape; infinite when they are equal."""
    error = float(np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2))
    return math.inf if error == 0 else 10.0 * math.log10(255.0**2 / error)


def ssim(a: np.ndarray, b: np.ndarray) -> float | None:
    """Return the structural similarity, mean over the frames; ``None`` where torchmetrics is not installed.

    Args:
        a, b: (F, H, W, 3) uint8.
    """
    import importlib.util

    import torch

    if importlib.util.find_spec("torchmetrics") is None:
        return None
    from torchmetrics.functional.image import structural_similarity_index_measure

    x, y = (torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).float() / 255 for frames in (a, b))
    value: Any = structural_similarity_index_measure(x, y, data_range=1.0)
    return float(value)


def pair_scores(dense: np.ndarray, other: np.ndarray) -> dict[str, Any]:
    """Compare an output with the dense one of the same prompt and noise.

    Args:
        dense, other: (F, H, W, 3) uint8.

    Returns:
        ``psnr`` (dB, ``None`` where they are equal), ``ssim`` and ``equal``.

    Raises:
        DitAttnError: sizes differ.
    """
    if dense.shape != other.shape:
        raise DitAttnError(f"outputs of {dense.shape} and {other.shape} cannot be compared: one size is needed")
    decibels = psnr(dense, other)
    equal = math.isinf(decibels)
    similar = ssim(dense, other)
    if equal and similar is not None:
        similar = 1.0  # but for rounding
    return {"psnr": None if equal else decibels, "ssim": similar, "equal": equal}


def verify_caption(frames: np.ndarray, prompt: str) -> dict[str, bool] | None:
    """Check which attributes of a caption the pixels show; ``None`` when it is no caption of the shapes world.

    Args:
        frames: (F, H, W, 3) uint8; one frame is an image.
        prompt: the caption.
    """
    from dit_attn.eval.shapes_world import items, world

    try:
        item = items.parse(prompt)
    except DitAttnError:
        return None
    if isinstance(item, world.VideoScene) and len(frames) == 1:
        return None
    return items.verify(list(frames), item)


def saturation(frames: np.ndarray) -> float:
    """Return the mean over the pixels of (F, H, W, 3) uint8 of the largest minus the smallest channel, in [0, 1]."""
    return float((frames.max(-1).astype(np.float64) - frames.min(-1)).mean() / 255.0)


def temporal(frames: np.ndarray) -> float | None:
    """Return the temporal consistency of (F, H, W, 3) uint8 frames, ``None`` with fewer than three.

    See :func:`dit_attn.eval.fidelity.temporal_consistency`.
    """
    import torch

    from dit_attn.eval.fidelity import temporal_consistency

    return temporal_consistency(torch.from_numpy(frames).permute(0, 3, 1, 2)) if len(frames) > 2 else None


# -- figures with intervals --------------------------------------------------------------------------------------------


def mean_figure(values: Sequence[float | bool | None], groups: Sequence[Any] | None = None) -> dict[str, Any] | None:
    """Return the mean of the values that are not ``None`` with its 95 % bootstrap interval (percentiles).

    Args:
        values: one per item.
        groups: group of every item, such as its prompt. Groups are resampled (cluster bootstrap), since several seeds
            of one prompt are not independent. Without groups every item is its own.

    Returns:
        ``value``, ``ci95`` (``None`` with fewer than two groups) and ``n``; ``None`` without any value.
    """
    found = [i for i, value in enumerate(values) if value is not None]
    if not found:
        return None
    chosen = None if groups is None else [groups[i] for i in found]
    return ratio_figure([float(values[i] or 0.0) for i in found], [1.0] * len(found), chosen)


def ratio_figure(
    over: Sequence[float], under: Sequence[float], groups: Sequence[Any] | None = None
) -> dict[str, Any] | None:
    """Return the ratio of two sums of paired values with its 95 % bootstrap interval; see :func:`mean_figure`."""
    if not len(over):
        return None
    names = list(range(len(over))) if groups is None else list(groups)
    places = {name: place for place, name in enumerate(dict.fromkeys(names))}
    sums = np.zeros((len(places), 2))
    np.add.at(sums, [places[name] for name in names], np.array([over, under], dtype=np.float64).T)
    value = sums[:, 0].sum() / sums[:, 1].sum()
    interval = None
    if len(sums) > 1:
        picks = np.random.default_rng(0).integers(0, len(sums), (RESAMPLES, len(sums)))
        found = sums[picks].sum(1)
        low, high = np.percentile(found[:, 0] / found[:, 1], (2.5, 97.5))
        interval = [float(low), float(high)]
    return {"value": float(value), "ci95": interval, "n": len(over)}


def difference_figure(
    a: Sequence[float | bool], b: Sequence[float | bool], groups: Sequence[Any] | None = None
) -> dict[str, Any] | None:
    """Return the mean of ``a - b`` over pairs with its 95 % bootstrap interval; see :func:`mean_figure`."""
    return mean_figure([float(x) - float(y) for x, y in zip(a, b, strict=True)], groups)


def jackknife(count: int, groups: Sequence[Any], statistic: Callable[[list[int]], float]) -> list[float] | None:
    """Return the 95 % jackknife interval of a statistic that a bootstrap would bias.

    Distances of sets grow when items are drawn twice. Here groups are left out one after the other (in at most
    ``BLOCKS`` blocks); the variance over what remains gives the standard error (Efron and Stein, The Jackknife Estimate
    of Variance, 1981).

    Args:
        count: number of items.
        groups: group of every item, such as its prompt.
        statistic: computes the value from the items at these positions.

    Returns:
        ``[low, high]``; ``None`` with fewer than two groups, or fewer than two items outside a block.
    """
    names = list(dict.fromkeys(groups))
    blocks = min(len(names), BLOCKS)
    if blocks < 2:
        return None
    block = {name: place % blocks for place, name in enumerate(names)}
    remaining = [[i for i in range(count) if block[groups[i]] != out] for out in range(blocks)]
    if min(map(len, remaining)) < 2:
        return None
    values = np.array([statistic(items) for items in remaining])
    error = math.sqrt((blocks - 1) / blocks * float(((values - values.mean()) ** 2).sum()))
    value = statistic(list(range(count)))
    return [value - 1.96 * error, value + 1.96 * error]
