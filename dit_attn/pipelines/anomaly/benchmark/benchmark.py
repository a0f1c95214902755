"""Train the same segmenter on every arm, with every number of shots and every seed, and write down what it finds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dit_attn.pipelines.anomaly.backbone import Backbone
from dit_attn.pipelines.anomaly.benchmark.arms import (
    GENERATED,
    NONE,
    Materials,
    Sample,
    make_drawn,
    shapes_of,
)
from dit_attn.pipelines.anomaly.benchmark.scores import score_maps
from dit_attn.pipelines.anomaly.benchmark.segmenter import (
    Data,
    SegmenterConfig,
    fit,
    predict,
    resized,
    resized_masks,
)
from dit_attn.pipelines.anomaly.benchmark.tasks import Split, Task
from dit_attn.pipelines.anomaly.benchmark.traces import Traces, make_traces
from dit_attn.pipelines.anomaly.concept import Concept
from dit_attn.pipelines.anomaly.generator import AnomalyGenerator
from dit_attn.pipelines.anomaly.manifest import MANIFEST, read_rows
from dit_attn.pipelines.anomaly.masks import MaskSource
from dit_attn.pipelines.anomaly.orders import GenerateConfig
from dit_attn.pipelines.anomaly.pixels import read_image, read_mask
from dit_attn.pipelines.anomaly.sources import Source
from dit_attn.pipelines.anomaly.training import CHECKPOINT, TrainConfig, train
from dit_attn.pipelines.measurement_log import MeasurementLog
from dit_attn.pipelines.run import Answers, answered_here


@dataclass(frozen=True)
class BenchmarkConfig:
    """What is measured.

    Attributes:
        arms: names, ``"none"`` among them.
        shots: numbers of real shots.
        seeds: repetitions; each has shots, weights and noise of its own.
        pairs: pairs that every arm but ``"none"`` adds.
        traces: normal test images that carry the traces of the model alone; 0 for no such control.
        segmenter: how the U-Net is trained.
        train: how a concept is learned.
        generate: how pairs are generated.
    """

    arms: tuple[str, ...]
    shots: tuple[int, ...] = (1, 3, 5, 10)
    seeds: int = 5
    pairs: int = 200
    traces: int = 16
    segmenter: SegmenterConfig = field(default_factory=SegmenterConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)

    def cells(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, int, int, str]]:
        """Yield (task, seed, shots, arm) of everything that is measured."""
        for task in tasks:
            for seed in range(self.seeds):
                for shots in self.shots:
                    if shots <= task.most:
                        yield from ((task, seed, shots, arm) for arm in self.arms)


def key_of(task: Task, seed: int, shots: int, arm: str) -> str:
    """Return the key of a measurement in the log."""
    return f"{task.name} seed {seed} k {shots} {arm}"


class Benchmark:
    """One benchmark. Concepts, pairs and measurements stay in its folder, so that it goes on where it stopped.

    Args:
        backbone: the pipeline.
        tasks: what is segmented.
        config: what is measured.
        folder: of concepts and pairs.
        log: of the measurements.
        model: name of the model, for the concept files.
        on_stage: called with what is being done in this process.
        answers: measures elsewhere, see :meth:`answer`, and ``backbone`` is not needed then; ``None``: in this process.
    """

    def __init__(
        self,
        backbone: Backbone | None,
        tasks: Sequence[Task],
        config: BenchmarkConfig,
        folder: Path,
        log: MeasurementLog,
        *,
        model: str = "",
        on_stage: Callable[[str], None] = lambda text: None,
        answers: Answers | None = None,
    ):
        self._backbone, self.tasks, self.config, self.folder = backbone, tuple(tasks), config, folder
        self.log, self.model, self.on_stage, self.answers = log, model, on_stage, answers
        self._trial: _Trial | None = None

    def run(self) -> list[dict[str, Any]]:
        """Measure what is not in the log yet; return all measurements in order.

        Raises:
            DitAttnError: an image cannot be used, or the disk is full.
        """
        cells = list(self.config.cells(self.tasks))
        missing = [cell for cell in cells if key_of(*cell) not in self.log.rows]
        groups = [[cell] for cell in missing]
        if self.answers is not None:  # a worker has all of a task and a seed: its images are drawn once
            trials = dict.fromkeys((task, seed) for task, seed, _, _ in missing)
            groups = [[cell for cell in missing if cell[:2] == trial] for trial in trials]
        requests = [
            {"task": group[0][0].name, "seed": group[0][1], "cells": [list(cell[2:]) for cell in group]}
            for group in groups
        ]
        for position, rows in (self.answers or answered_here(self.answer))(requests):
            for cell, row in zip(groups[position], rows):
                self.log.add(key_of(*cell), row)
        return [self.log.rows[key_of(*cell)] for cell in cells]

    def answer(self, request: dict[str, Any]) -> list[dict[str, Any]]:
        """Measure some cells of one task and one seed.

        Args:
            request: JSON values: name of the ``task``, ``seed``, and ``cells``, (shots, arm) each.
        """
        task, seed = next(task for task in self.tasks if task.name == request["task"]), request["seed"]
        if self._trial is None or (self._trial.task, self._trial.seed) != (task, seed):
            self._trial = _Trial(self, task, seed)
        return [self._trial.measure(shots, arm) for shots, arm in request["cells"]]

    @property
    def backbone(self) -> Backbone:
        """The pipeline."""
        assert self._backbone is not None
        return self._backbone

    def generator(self, concept: Concept | None, seed: int, arm: str = "") -> AnomalyGenerator:
        """Return the generator of a concept."""
        config = replace(self.config.generate, seed=seed)
        return AnomalyGenerator(
            self.backbone.pipe, concept, config, resolution=self.backbone.resolution, methods=GENERATED.get(arm, ()),
            prompt=self.config.train.prompt, normal_prompt=self.config.train.normal_prompt,
        )  # fmt: skip


class _Trial:
    """One task with one seed: its images, the test, and the traces, which do not depend on the shots."""

    def __init__(self, benchmark: Benchmark, task: Task, seed: int):
        self.benchmark, self.task, self.seed, self.config = benchmark, task, seed, benchmark.config
        self.split: Split = task.split(seed)
        self.shots = [shot.read() for shot in self.split.pool[: max(self.config.shots)]]
        self.normals = [read_image(path) for path in self.split.normals]
        self.textures = [read_image(path) for path in self.split.textures]
        size = self.config.segmenter.size
        tests = [shot.read() for shot in self.split.test_defects]
        clean = [read_image(path) for path in self.split.test_normals]
        self.images = resized([*(pixels for pixels, _ in tests), *clean], size)
        masks = resized_masks([mask for _, mask in tests], size)
        self.masks = torch.cat([masks, torch.zeros(len(clean), 1, size, size)])[:, 0] > 0
        self.traces: Traces | None = None
        if self.config.traces:
            benchmark.on_stage(f"{task.name}, seed {seed}: controls")
            self.traces = make_traces(
                benchmark.generator(None, seed), task.product, task.defect, clean[: self.config.traces],
                shapes_of(self.shots), size, seed,
            )  # fmt: skip

    def measure(self, shots: int, arm: str) -> dict[str, Any]:
        """Make the arm's pairs, train on them, test."""
        config, task = self.config, self.task
        self.benchmark.on_stage(f"{task.name}, seed {self.seed}, {shots} shots: {arm}")
        start = time.monotonic()
        made, about = self._pairs(shots, arm)
        middle = time.monotonic()
        data = Data(self.normals, self.shots[:shots], made, config.segmenter)
        model = fit(data, config.segmenter, self.seed, self.benchmark.backbone.device)
        scores = score_maps(predict(model, self.images), self.masks)
        traces = self.traces.score(model) if self.traces is not None else {}
        return {
            "task": task.name, "group": task.group, "seed": self.seed, "shots": shots, "arm": arm, "scores": scores,
            "traces": traces, "pairs": {"count": len(made), **about},
            "seconds": {"pairs": round(middle - start, 2), "segmenter": round(time.monotonic() - middle, 2)},
        }  # fmt: skip

    def _pairs(self, shots: int, arm: str) -> tuple[list[Sample], dict[str, Any]]:
        if arm == NONE:
            return [], {}
        if arm in GENERATED:
            return self._generated(shots, arm)
        materials = Materials(self.normals, self.shots[:shots], self.textures)
        return make_drawn(arm, materials, self.config.pairs, (self.seed, shots)), {}

    def _generated(self, shots: int, arm: str) -> tuple[list[Sample], dict[str, Any]]:
        task, pair = self.task, (self.task.product, self.task.defect)
        start = time.monotonic()
        concept = self._concept(shots)
        learned = time.monotonic() - start
        folder = self.benchmark.folder / "pairs" / task.name / f"seed{self.seed}_k{shots}_{arm}"
        summary = self.benchmark.generator(concept, self.seed, arm).run(
            folder, {task.product: self.split.normals}, {pair: self.config.pairs},
            {pair: MaskSource("real", concept.shapes[task.name])}, controls=0,
        )["pairs"][task.name]  # fmt: skip
        rows = [row for row in read_rows(folder / MANIFEST) if row["decision"] == "accepted"]
        found = [folder / row[key] for row in rows for key in ("generated", "mask_file")]
        made = [(read_image(image), read_mask(mask, image)) for image, mask in zip(found[::2], found[1::2])]
        about = {key: summary[key] for key in ("rejected", "missing", "ratio", "fill") if key in summary}
        return made, {**about, "concept_seconds": round(learned, 2)}

    def _concept(self, shots: int) -> Concept:
        """The concept of the first ``shots``, learned once for all arms."""
        folder = self.benchmark.folder / "concepts" / self.task.name / f"seed{self.seed}_k{shots}"
        path, checkpoint = folder / "concept.safetensors", folder / CHECKPOINT
        if path.is_file():
            return Concept.load(path)
        source = Source({self.task.product: list(self.split.normals)}, list(self.split.pool[:shots]))
        concept = train(
            self.benchmark.backbone, source, replace(self.config.train, seed=self.seed), folder,
            model=self.benchmark.model, resume=checkpoint.is_file(),
        )  # fmt: skip
        checkpoint.unlink(missing_ok=True)
        return concept


def setup_of(tasks: Sequence[Task], config: BenchmarkConfig, model: dict[str, Any]) -> dict[str, Any]:
    """Return everything that the measurements depend on but the arms, which may be added later.

    Args:
        tasks: what is segmented.
        config: what is measured; more seeds, shots and arms may be added to a log.
        model: name and fingerprint.
    """
    kept = {name: value for name, value in asdict(config).items() if name not in ("arms", "shots", "seeds")}
    return {"model": model, "most": max(config.shots), "tasks": [task.name for task in tasks], **kept}


def mean_seconds(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return how long parts took on average: a concept, a pair of each generated arm, a segmenter."""
    out: dict[str, float] = {}
    learned = [row["pairs"]["concept_seconds"] for row in rows if row["pairs"].get("concept_seconds", 0) > 0.5]
    if learned:
        out["concept"] = float(np.mean(learned))
    for arm in GENERATED:
        own = [row for row in rows if row["arm"] == arm and row["pairs"]["count"]]
        if own:
            spent = [(row["seconds"]["pairs"] - row["pairs"]["concept_seconds"]) / row["pairs"]["count"] for row in own]
            out[f"pair, {arm}"] = float(np.mean(spent))
    if rows:
        out["segmenter"] = float(np.mean([row["seconds"]["segmenter"] for row in rows]))
    return out
