"""The configuration of ``dit-attn calibrate``, checked before weights are loaded."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dit_attn.cli import jobs as job_files
from dit_attn.cli import method_options, outputs, resolve_methods, run_record
from dit_attn.cli.captions import shuffled_captions
from dit_attn.cli.check_run import check_run
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

    @classmethod
    def from_options(cls, options: Options) -> CalibrateConfig:
        """Check the flags.

        Raises:
            DitAttnError: bad input.
        """
        specs = method_options.method_specs(options)
        load = LoadConfig.from_options(options)
        _check(options)
        source = load.source
        if source.transformer is None:
            raise DitAttnError(
                f"{source.pipeline.__name__} of {source.name} has no diffusion transformer, so there is nothing to "
                "calibrate"
            )
        methods = resolve_methods.resolve(specs, source.transformer, options.get("preset"))
        if len(methods) != 1:
            raise DitAttnError(
                f"calibrate takes one method, got {len(methods)}; give --method NAME, e.g. rectified-spaattn"
            )
        items, check = make_items(options, source)
        check_run(source, [*items, *check], methods)
        steps = steps_of([*items, *check], source.pipeline)
        plan = make_plan(
            methods[0], options.get("parts"), _densities(options), options.get("every"), steps,
            options.get("by_head", False),
        )  # fmt: skip
        name = f"calibrate-{Path(source.path).name or 'model'}-{plan.method.slug}"
        folder = outputs.folder_of(options.get("output"), Path("outputs") / name)
        rest = options.pick("cost", "error", "push_to_hub", "resume", "dry_run", "json")
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


def _check(options: Options) -> None:
    if "cost" in options and "error" in options:
        raise DitAttnError("--cost and --error are two budgets; give one of them")
    for name in ("cost", "error"):
        if options.get(name) == 0.0:
            raise DitAttnError(f"--{name} must be above 0, got 0")
    if "check" in options and "held_out" in options:
        raise DitAttnError("--check and --held-out are two sets of items to compare on; give one of them")
    repo = options.get("push_to_hub")
    if repo is not None and (repo.count("/") != 1 or not all(repo.split("/"))):
        raise DitAttnError(f"--push-to-hub must be ORG/NAME, got {repo!r}")


def _densities(options: Options) -> list[float] | None:
    if "densities" not in options:
        return None
    try:
        return [float(part) for part in options["densities"].split(",")]
    except ValueError as error:
        raise DitAttnError(
            f"--densities must be numbers with commas between, such as 0.5,0.25,0.125, got {options['densities']!r}"
        ) from error


def make_items(options: Options, source: Source) -> tuple[list[Job], list[Job]]:
    """Make the items to calibrate on and those to compare on.

    Raises:
        DitAttnError: no prompts, too few of them, captions for a model that is not embedded, an item twice.
    """
    values = dict(options.values)
    written = "prompt" in options or "prompts" in options
    for name in ("held_out",) if written else ("held_out", "check"):
        if options.get(name) and source.kind != "embedded":
            raise DitAttnError(
                f"--{name.replace('_', '-')} {options[name]} without prompts is for embedded models, which know the "
                f"shapes world, not for {source.name}; give --prompts FILE with --items N --check N"
            )
    if not written:
        if source.kind != "embedded":
            raise DitAttnError("no prompt; give --prompts FILE or --prompt TEXT several times")
        values["prompt"] = shuffled_captions(source.defaults, False, options.get("items", ITEMS))
    jobs = job_files.make_jobs(values, source.defaults)
    count = options.get("check", 0) if written else 0
    items = options.get("items", max(len(jobs) - count, 1))
    if items + count > len(jobs):
        raise DitAttnError(
            f"--items {items} and --check {count} need {items + count} prompts, there are {len(jobs)}; give more "
            "prompts or smaller numbers"
        )
    check = jobs[items : items + count]
    number = options.get("held_out", 0 if written else options.get("check", 0))
    if number:
        texts = {
            **values,
            "prompt": shuffled_captions(source.defaults, True, number),
            "seed": options.get("seed", 42) + APART,
        }
        texts.pop("prompts", None)
        check = job_files.make_jobs(texts, source.defaults)
    found = [*jobs[:items], *check]
    for i, job in enumerate(found):
        if any(replace(job, index=0, where="") == replace(other, index=0, where="") for other in found[:i]):
            raise DitAttnError(
                f"{job.where}: {job.prompt!r} with seed {job.seed} is there twice; leave one of them out"
            )
    return jobs[:items], check
