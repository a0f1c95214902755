"""Score sets of perturbed heads on pairs of prompt and noise; every score is logged, and shared between processes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from dit_attn.errors import DitAttnError
from dit_attn.pipelines.head_search.objective import Objective, score_images
from dit_attn.pipelines.measurement_log import MeasurementLog
from dit_attn.pipelines.run import Answers, answered_here
from dit_attn.pipelines.worker_share import WorkerShare
from dit_attn.processors.guidance import heads

Head = tuple[str, int]
"""Layer and position of an attention head."""
Arm = tuple[tuple[str, int, float], ...]
"""A set of heads with their strengths (an arm of a multi-armed bandit); ``()`` is no guidance."""
Layers = dict[str, int]
"""Layers with their number of heads, in the order they run."""


class Runner(Protocol):
    """Runs an arm: ``run(arm, pairs, steps)`` returns one uint8 (F, H, W, 3) per pair (``None`` where the result is not
    finite), and the number of transformer passes per pair."""

    def __call__(self, arm: Arm, pairs: Sequence[Pair], steps: int | None) -> tuple[list[np.ndarray | None], float]: ...


@dataclass(frozen=True)
class Pair:
    """A prompt and the seed of its noise."""

    prompt: str
    seed: int


class Evaluator:
    """Scores arms on pairs of prompt and noise, each once.

    All arms get the same pairs, so that differences between arms are paired (common random numbers).

    Args:
        runner: runs arms.
        objective: scores the images.
        pairs: prompts with seeds.
        layers: layers with their number of heads, in the order they run.
        batch: pairs per call of the runner.
        log: earlier scores, and where new ones go; ``None`` keeps them in memory.
        worker: which part of the work this process does.
        on_progress: called with (done, total) images of the current evaluation.
        answers: makes and scores images elsewhere, see :meth:`answer`; ``None``: in this process.

    Attributes:
        images, passes: number of images and of transformer passes by purpose, those of resumed runs included.
    """

    def __init__(
        self,
        runner: Runner,
        objective: Objective,
        pairs: Sequence[Pair],
        layers: Layers,
        *,
        batch: int = 4,
        log: MeasurementLog | None = None,
        worker: WorkerShare | None = None,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
        answers: Answers | None = None,
    ) -> None:
        self.runner, self.objective, self.pairs, self.layers = runner, objective, list(pairs), layers
        self.batch, self.on_progress = batch, on_progress
        self.log = MeasurementLog() if log is None else log
        self.worker = WorkerShare() if worker is None else worker
        self.answers = answered_here(self.answer) if answers is None else answers
        self._order = {layer: i for i, layer in enumerate(layers)}
        self._counted: set[str] = set()
        self.images: Counter[str] = Counter()
        self.passes: Counter[str] = Counter()

    @property
    def heads(self) -> list[Head]:
        """All heads of all layers."""
        return [(layer, head) for layer, count in self.layers.items() for head in range(count)]

    def ordered(self, arm: Sequence[tuple[str, int, float]]) -> Arm:
        """Return the arm in the order of layers and heads.

        Of a head that occurs twice the last strength counts; heads of strength 0 are left out.
        """
        strengths = {(layer, head): u for layer, head, u in arm}
        places = sorted(strengths, key=lambda where: (self._order[where[0]], where[1]))
        return tuple((layer, head, strengths[layer, head]) for layer, head in places if strengths[layer, head] > 0.0)

    def scores(
        self, arms: Sequence[Arm], where: Sequence[int], steps: int | None = None, purpose: str = "candidates"
    ) -> np.ndarray:
        """Score arms; scores that the log has are not computed again.

        Args:
            arms: to score.
            where: positions of the pairs.
            steps: denoising steps of a run; ``None`` for those of the call.
            purpose: key of :attr:`images` and :attr:`passes`.

        Returns:
            (arms, pairs), NaN where no finite image was made; (arms, 1) for objectives of sets.

        Raises:
            DitAttnError: a process failed.
        """
        arms = [self.ordered(arm) for arm in arms]
        groups = self._groups(where)
        work = list(dict.fromkeys((arm, group) for arm in arms for group in self._missing(arm, groups, steps)))
        self._evaluate(work, steps)
        keys = [[self._key(arm, unit, steps) for unit in self._units(where)] for arm in arms]
        for key in (key for row in keys for key in row if key not in self._counted):
            self._counted.add(key)
            self.images[purpose] += int(self.log.rows[key][2])
            self.passes[purpose] += self.log.rows[key][1]
        values = [[self.log.rows[key][0] for key in row] for row in keys]
        return np.array([[np.nan if x is None else x for x in row] for row in values], dtype=np.float64)

    def means(self, table: np.ndarray) -> np.ndarray:
        """Return (arms,) means over pairs; -inf for an arm without a finite score somewhere."""
        return np.where(np.isnan(table).any(1), -np.inf, np.nan_to_num(table).mean(1))

    def _units(self, where: Sequence[int]) -> list[tuple[int, ...]]:
        """The sets of pairs that have a score."""
        return [tuple(where)] if self.objective.of_set else [(i,) for i in where]

    def _groups(self, where: Sequence[int]) -> list[tuple[int, ...]]:
        """The pairs of one call; the same for every arm."""
        if self.objective.of_set:
            return [tuple(where)]
        groups: dict[int, list[int]] = {}
        for i in where:
            groups.setdefault(i // self.batch, []).append(i)
        return [tuple(group) for group in groups.values()]

    def _missing(self, arm: Arm, groups: Sequence[tuple[int, ...]], steps: int | None) -> Iterator[tuple[int, ...]]:
        for group in groups:
            units = [unit for unit in self._units(group) if self._key(arm, unit, steps) not in self.log.rows]
            if units:
                yield tuple(i for unit in units for i in unit)

    def _key(self, arm: Arm, unit: tuple[int, ...], steps: int | None) -> str:
        pairs = ",".join(map(str, unit))
        return f"{steps or 'all'}/{pairs}/{format_arm(arm)}"

    def _evaluate(self, work: Sequence[tuple[Arm, tuple[int, ...]]], steps: int | None) -> None:
        """Compute the missing scores, every process its part, and exchange them."""
        worker, total = self.worker, sum(len(group) for _, group in work)
        new: list[tuple[str, Any]] = []
        failure: list[str] = []
        done, mine = 0, work[worker.rank :: worker.size]
        requests = [{"arm": [list(head) for head in arm], "pairs": list(group), "steps": steps} for arm, group in mine]
        try:
            for position, rows in self.answers(requests):
                for key, row in rows:
                    self.log.add(key, row)
                    new.append((key, row))
                done += len(mine[position][1])
                self.on_progress(min(done * worker.size, total), total)
        except Exception as error:
            if worker.size == 1:
                raise
            failure.append(f"process {worker.rank}: {type(error).__name__}: {error}")
        if worker.size == 1 or not work:
            return
        self.log.rows.update(worker.gather(new))
        failures = worker.gather(failure)
        if failures:
            raise DitAttnError(f"{failures[0]}; finished scores are saved: run the same command with --resume")

    def answer(self, request: dict[str, Any]) -> list[tuple[str, Any]]:
        """Return key and (score, passes, images) of every unit of a group of pairs.

        Args:
            request: JSON values: ``arm``, heads with strengths, ``pairs``, their positions, and ``steps``.
        """
        arm, group, steps = parse_arm(request["arm"]), tuple(request["pairs"]), request["steps"]
        pairs = [self.pairs[i] for i in group]
        images: list[np.ndarray | None] = []
        passes = 0.0
        for start in range(0, len(pairs), self.batch):
            batch = pairs[start : start + self.batch]
            made, cost = self.runner(arm, batch, steps)
            images += made
            passes += cost * len(batch)
        finite = [i for i, image in enumerate(images) if image is not None]
        prompts = [pair.prompt for pair in pairs]
        shown = [image for image in images if image is not None]
        if self.objective.of_set:
            score = score_images(self.objective, shown, prompts)[0] if len(finite) == len(images) else None
            return [(self._key(arm, group, steps), [score, passes, len(group)])]
        found = score_images(self.objective, shown, [prompts[i] for i in finite]) if finite else []
        scores = dict(zip(finite, found))
        each = passes / len(group)
        return [(self._key(arm, (i,), steps), [scores.get(n), each, 1]) for n, i in enumerate(group)]


def parse_arm(data: Sequence[Sequence[Any]]) -> Arm:
    """Return an arm of JSON values."""
    return tuple((str(layer), int(head), float(u)) for layer, head, u in data)


def format_arm(arm: Arm) -> str:
    """Return the canonical text of an arm; ``none`` for no guidance."""
    return heads.canonical([(layer, head, u) for layer, head, u in arm]) or "none"
