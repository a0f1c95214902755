"""The configuration of ``dit-attn calibrate``, checked before weights are loaded."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dit_attn.cli import engines, method_options, outputs, resolve_methods, run_record
from dit_attn.cli import jobs as job_files
from dit_attn.cli.captions import shuffled_captions
from dit_attn.cli.check_run import check_run
from dit_attn.cli.commands.calibrate import early
from dit_attn.cli.engines import EngineConfig
from dit_attn.cli.jobs import Job
from dit_attn.cli.load_pipeline import LoadConfig
from dit_attn.cli.model_source import Source
from dit_attn.cli.options import Options
from dit_attn.errors import DitAttnError
from dit_attn.pipelines.calibrate.sensitivity import CalibrationPlan, make_plan

ITEMS = 4
APART = 1000  # between the seeds of training captions and of held-out ones
_SAME = ("height", "width", "num_frames", "num_inference_steps", "guidance_scale")


@dataclass(frozen=True)
class CalibrateConfig:
    """One calibration, checked; no weights are loaded.

    Attributes:
        load: the pipeline.
        plan: what is measured.
        items, check: to calibrate on and to compare on.
        folder: of the result.
        argv: the command line, for the records.
        steps: denoising steps of a run, where they are known.
        cost, error: the budget; both ``None``: the cost of one density for all.
        push_to_hub: repository to upload to.
        resume: keep the measurements that are there already.
        dry_run, json: print the plan and stop; print JSON.
        options: the flags, for workers.
        engine: workers that make the runs; ``None``: this process does.
    """

    load: LoadConfig
    plan: CalibrationPlan
    items: tuple[Job, ...]
    check: tuple[Job, ...]
    folder: Path
    argv: tuple[str, ...]
    steps: int | None = None
    cost: float | None = None
    error: float | None = None
    push_to_hub: str | None = None
    resume: bool = False
    dry_run: bool = False
    json: bool = False
    options: Options = field(default_factory=lambda: Options({}), repr=False)
    engine: EngineConfig | None = None

    @classmethod
    def from_options(cls, options: Options) -> CalibrateConfig:
        """Check the flags.

        Raises:
            DitAttnError: bad input.
        """
        specs = method_options.method_specs(options)
        load = LoadConfig.from_options(options)
        source = load.source
        if source.transformer is None:
            raise DitAttnError(
                f"{source.pipeline.__name__} of {source.name} has no diffusion transformer, so there is nothing to "
                "calibrate"
            )
        methods = resolve_methods.resolve(specs, source.transformer, options.get("preset"))
        items, check = make_items(options, source)
        check_run(source, [*items, *check], methods)
        steps = steps_of([*items, *check], source.pipeline)
        plan = make_plan(
            methods[0], options.get("parts"), early.densities(options), options.get("every"), steps,
            options.get("by_head", False),
        )  # fmt: skip
        name = f"calibrate-{Path(source.path).name or 'model'}-{plan.method.slug}"
        folder = outputs.folder_of(options.get("output"), Path("outputs") / name)
        rest = options.pick("cost", "error", "push_to_hub", "resume", "dry_run", "json")
        rest |= {"options": options, "engine": engines.from_options(options)[0]}
        return cls(load, plan, tuple(items), tuple(check), folder, options.argv, steps, **rest)

    @property
    def budget(self) -> str:
        """The budget in words."""
        if self.error is not None:
            return f"an error of {self.error:g}"
        return f"a cost of {self.cost:g}" if self.cost is not None else "the cost of one density for all"

    def new_run(self) -> run_record.Run:
        """Make the setup and facts of the run, for the records."""
        return run_record.new_run(self.load, (self.plan.method,), self.folder, self.argv)


def steps_of(jobs: Sequence[Job], pipeline: Any) -> int | None:
    """Return the steps of a run, where the call or its default says so.

    Raises:
        DitAttnError: the items differ in what densities depend on.
    """
    for name in _SAME:
        values = {json.dumps(job.call.get(name)) for job in jobs}
        if len(values) > 1:
            raise DitAttnError(
                f"items with {name} {', '.join(sorted(values))} cannot be calibrated together; give one for all"
            )
    default = inspect.signature(pipeline.__call__).parameters.get("num_inference_steps")
    steps = jobs[0].call.get("num_inference_steps", default.default if default else None)
    return steps if isinstance(steps, int) else None


def make_items(options: Options, source: Source) -> tuple[list[Job], list[Job]]:
    """Make the items to calibrate on and those to compare on.

    Raises:
        DitAttnError: no prompts, too few of them, captions for a model that is not embedded, an item twice.
    """
    values, written = dict(options.values), early.has_prompts(options)
    early.check_captions(options, source.kind)
    if not written:
        values["prompt"] = shuffled_captions(source.defaults, False, options.get("items", ITEMS))
    items, check = early.split(options, job_files.make_jobs(values, source.defaults))
    number = options.get("held_out", 0 if written else options.get("check", 0))
    if number:
        texts = {
            **values,
            "prompt": shuffled_captions(source.defaults, True, number),
            "seed": options.get("seed", 42) + APART,
        }
        texts.pop("prompts", None)
        check = job_files.make_jobs(texts, source.defaults)
    found = [*items, *check]
    for i, job in enumerate(found):
        if any(replace(job, index=0, where="") == replace(other, index=0, where="") for other in found[:i]):
            raise DitAttnError(
                f"{job.where}: {job.prompt!r} with seed {job.seed} is there twice; leave one of them out"
            )
    return items, check
