"""What is asked of a generator, and what it gives back: settings, orders with their seeds, pairs."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dit_attn.errors import DitAttnError, unknown
from dit_attn.pipelines.anomaly.gate import Scores

REWEIGHTING = ("off", "bias", "gain", "logit")


@dataclass(frozen=True)
class GenerateConfig:
    """How pairs are made.

    Attributes:
        steps: of the scheduler.
        guidance: guidance scale, against the prompt of the normal product.
        batch: images at once.
        retries: new seeds after a rejection.
        dilate: tokens by which the painted region grows while the noise level is above ``dilate_above``.
        dilate_above: noise level in [0, 1].
        feather: pixels around the mask over which painted and normal pixels are mixed.
        crop: ``"auto"`` or ``"none"``, see :func:`~dit_attn.pipelines.anomaly.views.view_of`.
        reweighting: mode of adaptive re-weighting, one of ``REWEIGHTING``; ``"off"`` for none.
        seed: of the run; every pair has one of its own, hashed from it.

    Raises:
        DitAttnError: an unknown mode.
    """

    steps: int = 20
    guidance: float = 2.0
    batch: int = 8
    retries: int = 3
    dilate: int = 1
    dilate_above: float = 0.5
    feather: int = 2
    crop: str = "auto"
    reweighting: str = "off"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.reweighting not in REWEIGHTING:
            raise unknown("mode of re-weighting", self.reweighting, REWEIGHTING)


@dataclass(frozen=True)
class Order:
    """One pair to be made.

    Attributes:
        product, defect: names.
        number: within them, from 0.
        attempt: 0, or the number of rejections before.
        normal: file of the normal image.
        pixels: (H, W, 3) uint8.
        mask: (H, W) bool.
        seed: of the noise.
    """

    product: str
    defect: str
    number: int
    attempt: int
    normal: Path
    pixels: np.ndarray = field(repr=False)
    mask: np.ndarray = field(repr=False)
    seed: int = 0


@dataclass(frozen=True)
class Made:
    """A pair as made.

    Attributes:
        order: what was asked for.
        image: (H, W, 3) uint8, equal to the normal image outside the dilated mask.
        scores: what the gate measured; ``None`` without a gate.
        rejected: why it is rejected, ``""`` for an accepted one.
    """

    order: Order
    image: np.ndarray
    scores: Scores | None
    rejected: str


def seed_of(run: int, *parts: object) -> int:
    """Hash the seed of the run and the name of a pair into a seed; it depends on nothing else."""
    text = json.dumps([run, *map(str, parts)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


def check_counts(counts: dict[tuple[str, str], int]) -> None:
    """Refuse a run without pairs.

    Raises:
        DitAttnError: there are none.
    """
    if not counts or not any(counts.values()):
        raise DitAttnError("there is nothing to make; give --count N or --per-defect N")
