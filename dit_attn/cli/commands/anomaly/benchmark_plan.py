"""What ``dit-attn anomaly benchmark`` will measure, by its flags: checked before weights are loaded."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_attn import files
from dit_attn.cli.commands.anomaly import inputs
from dit_attn.cli.method_index import known_methods
from dit_attn.cli.model_source import locate
from dit_attn.cli.options import Options
from dit_attn.errors import DitAttnError, unknown
from dit_attn.eval.inspection_world.defects import DEFECTS
from dit_attn.eval.inspection_world.products import PRODUCTS
from dit_attn.pipelines.anomaly.benchmark.arms import GENERATED, check_arms
from dit_attn.pipelines.anomaly.benchmark.tasks import NEW, OWN, SEEN, Task, check_images, given_tasks, world_tasks

if TYPE_CHECKING:
    from dit_attn.pipelines.anomaly.benchmark.benchmark import BenchmarkConfig

QUICK: dict[str, Any] = {
    "k": [1, 5], "seeds": 3, "pairs": 24, "segmenter_steps": 150, "segmenter_width": 8, "normals": 40, "tests": 24,
    "traces": 8,
}  # fmt: skip
FULL: dict[str, Any] = {
    "k": [1, 3, 5, 10], "seeds": 5, "pairs": 200, "segmenter_steps": 1000, "segmenter_width": 16, "normals": 100,
    "tests": 60, "traces": 16,
}  # fmt: skip
SEEN_PAIRS = (("metal", "scratch"), ("granite", "crack"), ("nut", "stain"))
_ELSEWHERE = ("concept", "count", "per_defect", "mask_source", "roi", "controls", "format", "with_normals", "shots",
              "push_to_hub", "learn_masks", "mask_steps", "reweighting", "estimate",
              "gradient_checkpointing")  # fmt: skip


@dataclass(frozen=True)
class BenchmarkPlan:
    """A benchmark, checked; no weights are loaded.

    Attributes:
        tasks: what is segmented.
        arms: where pairs come from.
        shots: numbers of real shots.
        size: pixels along a side at which the segmenter sees images.
        chosen: the flags, over the values of a full or quick benchmark.
        output: folder of the files.
    """

    tasks: list[Task]
    arms: tuple[str, ...]
    shots: tuple[int, ...]
    size: int
    chosen: dict[str, Any]
    output: Path

    def config(self, options: Options) -> BenchmarkConfig:
        """Return what is measured."""
        from dit_attn.pipelines.anomaly.benchmark.benchmark import BenchmarkConfig
        from dit_attn.pipelines.anomaly.benchmark.segmenter import SegmenterConfig

        train, chosen = inputs.train_config(options), self.chosen
        segmenter = SegmenterConfig(
            size=self.size, width=chosen["segmenter_width"], steps=chosen["segmenter_steps"], flips=train.flips
        )
        traces = chosen["traces"] if set(self.arms) & set(GENERATED) else 0
        return BenchmarkConfig(
            self.arms, self.shots, chosen["seeds"], chosen["pairs"], traces, segmenter, train,
            inputs.generate_config(options),
        )  # fmt: skip


def plan_of(options: Options) -> BenchmarkPlan:
    """Check the flags and find the images.

    Raises:
        DitAttnError: a flag, an image, a mask or the model cannot be used.
    """
    inputs.check_model(options)
    inputs.reject(options, "benchmark", *_ELSEWHERE)
    arms = check_arms(options.get("arms", ()), tuple(known_methods()))
    chosen = {**(QUICK if options.get("quick") else FULL), **options.values}
    shots = tuple(sorted(set(chosen["k"])))
    given = "data" in options or "normal" in options
    size = chosen.get("segmenter_size", 256 if given else 64)
    if size % 8:
        raise DitAttnError(f"--segmenter-size {size} is no multiple of 8; give one")
    if importlib.util.find_spec("torchmetrics") is None:
        raise DitAttnError("the benchmark needs torchmetrics, which is not there: `pip install 'dit-attn[eval]'`")
    output = inputs.output_folder(options, "benchmark")
    tasks = _given(options, shots[-1]) if given else _world(options, output, shots[-1], chosen)
    return BenchmarkPlan(tasks, arms, shots, size, chosen, output)


def _given(options: Options, most: int) -> list[Task]:
    tasks = given_tasks(inputs.find_source(options, shots=True), most)
    check_images(tasks)
    return tasks


def _world(options: Options, output: Path, most: int, chosen: dict[str, Any]) -> list[Task]:
    """Tasks of the inspection world: the chosen products and defects, else three pairs of each kind, quick: one."""
    for flag, known in (("product", PRODUCTS), ("defect", DEFECTS)):
        for name in options.get(flag, ()):
            if name not in known:
                raise unknown(flag, name, known)
    for flag in ("defects", "masks"):
        if flag in options:
            raise DitAttnError(f"--{flag} without --normal; give --normal DIR too")
    from dit_attn.eval.inspection_world.world import HELD_OUT_PAIRS, pairs

    if "product" in options or "defect" in options:
        wanted = [
            (p, d) for p, d in (*pairs(), *HELD_OUT_PAIRS)
            if p in options.get("product", [p]) and d in options.get("defect", [d])
        ]  # fmt: skip
    else:
        few = 1 if options.get("quick") else None
        wanted = [*SEEN_PAIRS[:few], *HELD_OUT_PAIRS[:few]]
    trained = _is_tiny_inspect(options)
    named = [(p, d, (NEW if (p, d) in HELD_OUT_PAIRS else SEEN) if trained else OWN) for p, d in wanted]
    size = chosen.get("segmenter_size", 64)
    return world_tasks(output / "data", named, shots=most, size=size, normals=chosen["normals"], tests=chosen["tests"])


def _is_tiny_inspect(options: Options) -> bool:
    """Whether the model was trained on the inspection world but for its held-out pairs."""
    _, path, _ = locate(options["model"], options.get("revision"), options.get("variant"))
    record = Path(path) / "training.json"
    try:
        return bool(files.parse_json(record.read_bytes())["name"] == "tiny-inspect")
    except (OSError, ValueError, KeyError, TypeError):
        return False


def describe(plan: BenchmarkPlan) -> str:
    """Return what would be measured, in words."""
    tasks, arms, shots, chosen = plan.tasks, plan.arms, plan.shots, plan.chosen
    lines = [f"{task.name}, {task.group}: {task.text}" for task in tasks]
    for task in tasks:
        if left := [str(k) for k in shots if k > task.most]:
            lines.append(f"{task.name}: k {', '.join(left)} is left out, there are {task.most} shots")
    used = sum(sum(k <= task.most for k in shots) for task in tasks) * chosen["seeds"]
    concepts = used if set(arms) & set(GENERATED) else 0
    painted = used * len(set(arms) & set(GENERATED)) * chosen["pairs"]
    return "\n".join([
        *lines, f"arms: {', '.join(arms)}",
        f"{used * len(arms)} segmenters of {chosen['segmenter_steps']} steps, {concepts} concepts, {painted} generated "
        "pairs",
    ])  # fmt: skip
