"""Figures of a comparison: one place that calls the metrics, the verifiers and the bootstrap of ``dit_attn.eval``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dit_attn.errors import DitAttnError

RESAMPLES = 2000
BLOCKS = 50  # of the jackknife


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of two uint8 arrays of one shape; infinite when they are equal."""
    error = float(np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2))
    return math.inf if error == 0 else 10.0 * math.log10(255.0**2 / error)


def ssim(a: np.ndarray, b: np.ndarray) -> float | None:
    """Structural similarity of two clips, mean over the frames; ``None`` where torchmetrics is not installed.

    Args:
        a, b: (F, H, W, 3) uint8.
    """
    import importlib.util

    import torch

    if importlib.util.find_spec("torchmetrics") is None:
        return None
    from torchmetrics.functional.image import structural_similarity_index_measure

    x, y = (torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).float() / 255 for frames in (a, b))
    found: Any = structural_similarity_index_measure(x, y, data_range=1.0)
    return float(found)


def pair_scores(dense: np.ndarray, other: np.ndarray) -> dict[str, Any]:
    """How far ``other`` is from ``dense``: ``psnr`` (dB, ``None`` where they are equal), ``ssim`` and ``equal``.

    Args:
        dense, other: (F, H, W, 3) uint8, the same prompt and noise.

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


def verdict(frames: np.ndarray, prompt: str) -> dict[str, bool] | None:
    """Which attributes of the prompt the pixels show; ``None`` when it is no caption of the world.

    Args:
        frames: (F, H, W, 3) uint8; one frame is a picture.
        prompt: the text it was made from.
    """
    from dit_attn.eval.shapes_world import verify, world

    try:
        item = world.parse(prompt)
    except DitAttnError:
        return None
    if isinstance(item, world.VideoScene):
        return verify.verify_video(list(frames), item) if len(frames) > 1 else None
    return verify.verify_image(frames[0], item)


def saturation(frames: np.ndarray) -> float:
    """Mean over the pixels of (F, H, W, 3) uint8 of the largest minus the smallest channel, in [0, 1]."""
    return float((frames.max(-1).astype(np.float64) - frames.min(-1)).mean() / 255.0)


def temporal(frames: np.ndarray) -> float | None:
    """Temporal consistency of (F, H, W, 3) uint8 frames, ``None`` with fewer than three; see ``eval.errors``."""
    import torch

    from dit_attn.eval.fidelity import temporal_consistency

    return temporal_consistency(torch.from_numpy(frames).permute(0, 3, 1, 2)) if len(frames) > 2 else None


# -- figures with intervals --------------------------------------------------------------------------------------------


def mean_figure(values: Sequence[float | bool | None], groups: Sequence[Any] | None = None) -> dict[str, Any] | None:
    """Mean of the values that exist with its 95 % bootstrap interval (percentiles): ``value``, ``ci95``, ``n``.

    Args:
        values: one an item.
        groups: what the items share, one an item: whole groups are resampled (cluster bootstrap), since several seeds
            of one prompt are not independent. Without them every item is its own.

    Returns:
        ``ci95`` is ``None`` with fewer than two groups; the whole is ``None`` without any value.
    """
    found = [i for i, value in enumerate(values) if value is not None]
    if not found:
        return None
    kept = None if groups is None else [groups[i] for i in found]
    return ratio_figure([float(values[i] or 0.0) for i in found], [1.0] * len(found), kept)


def ratio_figure(
    over: Sequence[float], under: Sequence[float], groups: Sequence[Any] | None = None
) -> dict[str, Any] | None:
    """Ratio of two sums of paired values with its 95 % bootstrap interval over the pairs, as :func:`mean_figure`."""
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
    """Mean of ``a - b`` over pairs with its 95 % bootstrap interval, as :func:`mean_figure`."""
    return mean_figure([float(x) - float(y) for x, y in zip(a, b, strict=True)], groups)


def jackknife(count: int, groups: Sequence[Any], statistic: Callable[[list[int]], float]) -> list[float] | None:
    """95 % interval of a statistic that a bootstrap would shift (distances of sets grow when items are drawn twice).

    The groups are left out one after the other (in at most ``BLOCKS`` blocks); the spread of what remains gives the
    standard error. Efron and Stein, The Jackknife Estimate of Variance (1981).

    Args:
        count: items.
        groups: what they share, one an item.
        statistic: its value from the items of these positions.

    Returns:
        ``None`` with fewer than two groups, or where a value of what remains does not exist.
    """
    names = list(dict.fromkeys(groups))
    blocks = min(len(names), BLOCKS)
    if blocks < 2:
        return None
    block = {name: place % blocks for place, name in enumerate(names)}
    kept = [[i for i in range(count) if block[groups[i]] != out] for out in range(blocks)]
    if min(map(len, kept)) < 2:
        return None
    values = np.array([statistic(items) for items in kept])
    error = math.sqrt((blocks - 1) / blocks * float(((values - values.mean()) ** 2).sum()))
    whole = statistic(list(range(count)))
    return [whole - 1.96 * error, whole + 1.96 * error]
