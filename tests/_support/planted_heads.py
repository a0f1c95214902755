"""A search problem with a known answer: heads of planted worth, scored through images that carry the score."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from dit_attn.pipelines.head_search.config import SearchConfig, SearchPlan
from dit_attn.pipelines.head_search.evaluation import Arm, Evaluator, Pair
from dit_attn.pipelines.head_search.objective import Objective
from dit_attn.pipelines.measurement_log import MeasurementLog

LAYERS = {f"blocks.{i}.attn1": 8 for i in range(12)}
HEADS = [(layer, head) for layer, count in LAYERS.items() for head in range(count)]
STEPS = 20


class PlantedRunner:
    """Makes images that carry the score of their arm: known worths of heads and of couples of heads, and noise.

    Attributes:
        made: (arm, seed, steps) of every image.
        steps: sum of their steps.
    """

    def __init__(self, worth: dict[Any, float], noise: float = 0.0) -> None:
        self.worth, self.noise = worth, noise
        self.made: list[tuple[Arm, int, int]] = []
        self.steps = 0

    def __call__(self, arm: Arm, pairs: Sequence[Pair], steps: int | None) -> tuple[list[Any], float]:
        names = {(layer, head) for layer, head, _ in arm}
        value = sum(u * self.worth.get((layer, head), 0.0) for layer, head, u in arm)
        value += sum(w for couple, w in self.worth.items() if isinstance(couple, frozenset) and couple <= names)
        out = []
        for pair in pairs:
            self.made.append((arm, pair.seed, steps or STEPS))
            self.steps += steps or STEPS
            shared = np.random.default_rng(pair.seed).normal()  # the same for every arm: common random numbers
            own = np.random.default_rng(zlib.crc32(repr((arm, pair.seed, steps)).encode())).normal()
            out.append(np.full((1, 1, 1, 1), value + 5.0 * shared + self.noise * own))
        return out, 2.0 * (steps or STEPS)


def read_scores(images: Sequence[np.ndarray], prompts: Sequence[str]) -> list[float]:
    """The objective: read the score off every image."""
    return [float(image.reshape(-1)[0]) for image in images]


def planted(runner: PlantedRunner, pairs: int = 4, log: MeasurementLog | None = None, **more: Any) -> Evaluator:
    """Make an evaluator of a runner on so many pairs."""
    known = [Pair(f"prompt {i}", i) for i in range(pairs)]
    return Evaluator(runner, Objective("planted", read_scores), known, LAYERS, log=log, **more)


def random_worths(seed: int = 0) -> dict[Any, float]:
    """Draw a worth for every head."""
    values = np.random.default_rng(seed).normal(size=len(HEADS))
    return dict(zip(HEADS, values.tolist()))


def plan(pairs: int = 1, full_steps: int | None = None, **settings: Any) -> SearchPlan:
    """Make a plan from settings of :class:`SearchConfig`."""
    return SearchPlan(SearchConfig(**settings), pairs, full_steps)
