"""Objectives of a head search: scores of images or videos, higher is better.

An objective is any callable ``(images, prompts) -> scores``: images are uint8 arrays (F, H, W, 3), F is 1 for an image,
and there is one score per image. The built-in ones (:mod:`~dit_attn.pipelines.head_search.objectives`) name their
network; those of CLIP's kind can also be differentiated, which the gradient strategy needs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dit_attn.errors import DitAttnError

ScoreImages = Callable[[Sequence[np.ndarray], Sequence[str]], Sequence[float]]
ScorePixels = Callable[[torch.Tensor, Sequence[str]], torch.Tensor]


@dataclass(frozen=True)
class Objective:
    """What a search raises.

    Attributes:
        name: of the objective.
        score: ``(images, prompts) -> scores``; with ``of_set`` one score for all images together.
        network: name of the network that scores.
        unit: of a score, in a few words.
        of_set: whether it scores a set of images and not each of them.
        pixels: the same from (B, F, 3, H, W) in [0, 1], differentiable; ``None`` where there is no such function.
    """

    name: str
    score: ScoreImages
    network: str = ""
    unit: str = "score"
    of_set: bool = False
    pixels: ScorePixels | None = None


@dataclass(frozen=True)
class ScorerOptions:
    """Networks and files that objectives need.

    Attributes:
        clip: a CLIP model of transformers, folder or Hub name, for ``clip`` and ``style``.
        weights: folder of the scorer (``pickscore``, ``hpsv2``), or of the CLIP model of ``aesthetic``.
        head: file of the linear or small network on top, for ``aesthetic``.
        style: words in front of the prompt, for ``style``.
        reference: uint8 (N, 3, H, W), for ``fid-world``; ``None`` draws the prompts, which must be captions then.
        device: where to compute.
    """

    clip: str | None = None
    weights: str | None = None
    head: str | None = None
    style: str | None = None
    reference: torch.Tensor | None = None
    device: Any = "cpu"


def score_images(objective: Objective, images: Sequence[np.ndarray], prompts: Sequence[str]) -> list[float | None]:
    """Return checked scores; ``None`` for scores that are not finite.

    Args:
        objective: scores the images.
        images: uint8 (F, H, W, 3) each.
        prompts: of the images.

    Returns:
        One score per image; a single one for an objective of sets.

    Raises:
        DitAttnError: the objective returned no numbers, or a wrong number of them.
    """
    with torch.no_grad():
        returned = objective.score(images, prompts)
    try:
        scores = [float(score) for score in returned]
    except (TypeError, ValueError) as error:
        kind = type(returned).__name__
        raise DitAttnError(
            f"the objective {objective.name} gave a {kind} that is no list of numbers; it must return one score an "
            "image"
        ) from error
    wanted = 1 if objective.of_set else len(images)
    if len(scores) != wanted:
        raise DitAttnError(
            f"the objective {objective.name} gave {len(scores)} scores for {len(images)} images; it must return "
            f"{wanted}"
        )
    return [score if np.isfinite(score) else None for score in scores]


def score_arrays(pixels: ScorePixels, images: Sequence[np.ndarray], prompts: Sequence[str]) -> list[float]:
    """Score uint8 (F, H, W, 3) arrays with a function of pixels."""
    stacked = torch.from_numpy(np.stack(list(images))).permute(0, 1, 4, 2, 3).float() / 255.0
    return [float(score) for score in pixels(stacked, prompts)]
