"""Figures of a comparison: one place that calls the metrics, the verifiers and the bootstrap of ``dit_attn.eval``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from dit_attn.errors import DitAttnError

RESAMPLES = 2000
PAIR_METRICS = ("psnr", "ssim")


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
    from dit_attn.eval import verify, world

    try:
        item = world.parse(prompt)
    except DitAttnError:
        return None
    if isinstance(item, world.Clip):
        return verify.verify_clip(list(frames), item) if len(frames) > 1 else None
    return verify.verify_image(frames[0], item)


def mean_figure(values: Sequence[float | bool | None]) -> dict[str, Any] | None:
    """Mean of the values that exist with its 95 % bootstrap interval (percentiles): ``value``, ``ci95``, ``n``.

    ``ci95`` is ``None`` with fewer than two values; the whole is ``None`` without any.
    """
    found = np.array([float(value) for value in values if value is not None])
    if not len(found):
        return None
    return _figure(float(found.mean()), found, lambda part: part.mean(-1))


def ratio_figure(over: Sequence[float], under: Sequence[float]) -> dict[str, Any] | None:
    """Ratio of two sums of paired values with its 95 % bootstrap interval over the pairs, as :func:`mean_figure`."""
    if not len(over):
        return None
    pairs = np.array([over, under], dtype=np.float64).T
    return _figure(float(pairs[:, 0].sum() / pairs[:, 1].sum()), pairs, _ratio)


def difference_figure(a: Sequence[float | bool], b: Sequence[float | bool]) -> dict[str, Any] | None:
    """Mean of ``a - b`` over pairs with its 95 % bootstrap interval, as :func:`mean_figure`."""
    return mean_figure([float(x) - float(y) for x, y in zip(a, b, strict=True)])


def _ratio(part: np.ndarray) -> np.ndarray:
    sums = part.sum(-2)
    return sums[..., 0] / sums[..., 1]


def _figure(value: float, items: np.ndarray, statistic: Any) -> dict[str, Any]:
    interval = None
    if len(items) > 1:
        picks = np.random.default_rng(0).integers(0, len(items), (RESAMPLES, len(items)))
        low, high = np.percentile(statistic(items[picks]), (2.5, 97.5))
        interval = [float(low), float(high)]
    return {"value": value, "ci95": interval, "n": len(items)}
