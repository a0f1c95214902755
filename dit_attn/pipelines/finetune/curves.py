"""How often a fine-tuned embedded model follows its prompts, over the steps, with SLA and with other sparse methods.

All arms compute about the same amount of attention, the linear branch of SLA and pooled keys counted, and are trained
alike on the same examples of the dense model. Beside them: dense, and methods without training.

python -m dit_attn.pipelines.finetune.curves --model tiny-video --quick --output outputs/curves
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from dit_attn import files, models
from dit_attn.api import enabled, summary
from dit_attn.eval.shapes_world import items, multi, world
from dit_attn.models.evaluate import current_commit, evaluate
from dit_attn.models.export import environment
from dit_attn.pipelines.finetune.config import FinetuneConfig
from dit_attn.pipelines.finetune.loop import CHECKPOINT, Finetune
from dit_attn.pipelines.finetune.teacher import record_examples
from dit_attn.pipelines.measurement_log import MeasurementLog
from dit_attn.processors.methods.base import Method, method_class

BLOCK = {"tiny-video": 36}
"""Tokens per block of a model, 32 elsewhere."""


@dataclass(frozen=True)
class CurveConfig:
    """What is measured.

    Attributes:
        model: embedded model.
        densities: critical fraction of SLA, one set of arms each.
        points: training steps at which the arms are scored, ascending; 0 is before training.
        count: held-out prompts; 0 measures the distance to the dense model alone, on held-out calls of it.
        steps: denoising steps; ``None`` for the model's own.
        runs, calls_per_run: of the dense model, that examples are drawn from.
        batch, lr: of the training.
        seed: of everything.
        device: where the model runs.
    """

    model: str = "tiny-video"
    densities: tuple[float, ...] = (0.2, 0.1, 0.05)
    points: tuple[int, ...] = (0, 100, 300, 1000)
    count: int = 200
    steps: int | None = None
    runs: int = 64
    calls_per_run: int = 8
    batch: int = 4
    lr: float = 2e-4
    seed: int = 0
    device: str = "cpu"

    @property
    def kind(self) -> str:
        """What the model draws: ``image``, ``video``, or scenes of several objects, ``multi``."""
        if models.available()[self.model].world == "objects":
            return "multi"
        return "video" if "num_frames" in self.call else "image"

    @property
    def call(self) -> dict[str, Any]:
        """Arguments of a run."""
        found = models.call_defaults(self.model)
        return found if self.steps is None else {**found, "num_inference_steps": self.steps}


QUICK = CurveConfig(densities=(0.05,), points=(0, 60), count=24, steps=8, runs=12, calls_per_run=4, batch=1, lr=3e-4)


@dataclass(frozen=True)
class Arm:
    """A method, and whether it is trained."""

    name: str
    method: Method
    trained: bool


def arms(pipe: Any, model: str, density: float) -> list[Arm]:
    """Return the arms of one density, all of the cost of SLA."""
    tokens, dim = models.available()[model].tokens, pipe.transformer.config.attention_head_dim
    block = BLOCK.get(model, 32)
    cost = density + dim / tokens + dim / (2 * block * block)
    shared: dict[str, Any] = {"q_block": block, "kv_block": block, "dense_steps": 0}
    alone, pooled = cost, max(cost - 1 / block, 1e-3)

    def make(slug: str, **settings: Any) -> Method:
        return method_class(slug)(**shared, **settings)

    sla: dict[str, Any] = {"density": density, "order": "none"}
    rectified = make("rectified-spaattn", density=pooled, order="none", pooled_block=block)
    return [
        Arm(f"sla {density:g}", make("sla", **sla), True),
        Arm(f"block-sparse {density:g}", make("block-sparse", density=alone, keep=("text",)), True),
        Arm(f"rectified {density:g}", rectified, True),
        Arm(f"mass {density:g}", make("sla", combine="mass", **sla), False),
    ]


def measure(config: CurveConfig, folder: Path, on_progress: Callable[[str], None] = print) -> dict[str, Any]:
    """Measure what is missing and return the record.

    Args:
        config: what is measured.
        folder: of the measurements, the examples and the checkpoints; a later call goes on.
        on_progress: callback(line).

    Raises:
        DitAttnError: measurements of another setup in the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    log = MeasurementLog(folder / "measurements.jsonl", asdict(config), resume=True)

    def score(pipe: Any, key: str, sparse: bool = True) -> None:
        if not config.count:
            return
        found = evaluate(pipe, config.kind, config.call, config.count, config.seed)[0]
        cost = summary(pipe).run_density if sparse else 1.0
        log.add(key, {"whole_caption": found["whole_caption"], "all": found["all_attributes"], "computed": cost})
        on_progress(f"{key}: {found['whole_caption']['right']} of {config.count}, computed {cost}")

    pipe = _fresh(config)
    if "dense" not in log.rows:
        score(pipe, "dense", sparse=False)
    prompts = _captions(config)
    examples = record_examples(
        pipe, prompts, folder / "data", calls_per_run=config.calls_per_run, seed=config.seed, call=config.call
    )
    for density in config.densities:
        for arm in arms(pipe, config.model, density):
            for point in config.points if arm.trained else config.points[:1]:
                key = f"{arm.name} @ {point}"
                if f"{key}: loss" in log.rows or (key in log.rows and not point):
                    continue
                if point == 0:
                    with enabled(pipe, arm.method):
                        score(pipe, key)
                    continue
                job = _trained(arm, point, config, examples, folder / arm.name.replace(" ", "-"))
                score(job.pipe, key)
                log.add(f"{key}: loss", job.log)
                on_progress(f"{key}: held-out loss {job.log[0]['held_out']:.4g} to {job.log[-1]['held_out']:.4g}")
    return {"config": asdict(config), "rows": dict(log.rows)}


def text_of(rows: dict[str, Any]) -> str:
    """Return the prompts followed as text, an arm a line, a column for every number of training steps.

    Args:
        rows: of the record, by arm and training steps.
    """
    scored = {tuple(key.split(" @ ")): row for key, row in rows.items() if " @ " in key and "whole_caption" in row}
    points = sorted({int(point) for _, point in scored})
    lines = [["prompts followed after", "computed", *(f"{point} steps" for point in points)]]
    if "dense" in rows:
        lines.append(["dense", "100%", _share(rows["dense"])])
    for arm in dict.fromkeys(name for name, _ in scored):
        cells = [_share(scored[arm, str(point)]) if (arm, str(point)) in scored else "" for point in points]
        computed = next(row["computed"] for (name, _), row in scored.items() if name == arm)
        lines.append([arm, f"{computed:.0%}", *cells])
    widths = [max(len(line[place]) for line in lines if place < len(line)) for place in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


def _share(row: dict[str, Any]) -> str:
    found = row["whole_caption"]
    return f"{found['right']} of {found['of']}"


def _fresh(config: CurveConfig) -> Any:
    pipe = models.load(config.model).to(config.device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _captions(config: CurveConfig) -> list[str]:
    """Captions of the training split, in a seeded order."""
    draw = torch.Generator().manual_seed(config.seed)
    if config.kind == "multi":
        return [items.caption(scene) for scene in multi.sample_scenes(config.runs, draw)]
    known = world.split(config.kind)[False]
    order = torch.randperm(len(known), generator=draw).tolist()
    return [items.caption(known[place]) for place in order[: config.runs]]


def _trained(arm: Arm, point: int, config: CurveConfig, examples: list[Path], folder: Path) -> Finetune:
    """An arm after ``point`` steps, from its checkpoint where there is one."""
    settings = FinetuneConfig(
        arm.method, steps=point, batch=config.batch, lr=config.lr, warmup=10, log_every=max(1, point // 4),
        checkpoint_every=25, seed=config.seed, held_out=0.05,
    )  # fmt: skip
    job = Finetune(_fresh(config), settings, examples)
    if (folder / CHECKPOINT).exists():
        job.restore(folder)
    job.fit(folder)
    job.model.eval()
    return job


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and write the record."""
    parser = argparse.ArgumentParser(prog="python -m dit_attn.pipelines.finetune.curves", description=__doc__)
    parser.add_argument("--model", default="tiny-video", choices=sorted(models.available()))
    parser.add_argument("--quick", action="store_true", help="one density, 60 steps, 24 prompts in 8 denoising steps")
    parser.add_argument("--count", type=int, help="held-out prompts; 0 for the distance to the dense model alone")
    parser.add_argument("--densities", type=float, nargs="+", help="of SLA (default: 0.2 0.1 0.05)")
    parser.add_argument("--points", type=int, nargs="+", help="training steps to score at (default: 0 100 300 1000)")
    parser.add_argument("--steps", type=int, help="denoising steps (default: the model's)")
    parser.add_argument("--output", type=Path, required=True, help="folder; started again, it goes on")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    chosen = QUICK if args.quick else CurveConfig()
    given = {name: getattr(args, name) for name in ("model", "device", "count", "densities", "points", "steps")}
    lists = {name: tuple(value) for name, value in given.items() if isinstance(value, list)}
    config = CurveConfig(**{**asdict(chosen), **{k: v for k, v in given.items() if v is not None}, **lists})
    found = measure(config, args.output, lambda line: print(line, flush=True))
    words = [*sys.argv[1:]] if argv is None else [*map(str, argv)]
    record = {
        "what": "held-out prompts followed by an embedded model, dense and with sparse methods at equal executed cost, "
        "before and after fine-tuning towards the dense model; 95 % Wilson intervals",
        "command": f"python -m dit_attn.pipelines.finetune.curves {shlex.join(words)}",
        "commit": current_commit(),
        "environment": environment(),
        **found,
    }
    files.write_json(args.output / "curves.json", record)
    print(text_of(found["rows"]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
