"""The work of ``dit-attn calibrate``: load, measure what is missing, write the file, upload it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch

from dit_attn.cli import jobs as job_files
from dit_attn.cli import load_pipeline, outputs, worker_setup
from dit_attn.cli.commands.calibrate.config import CalibrateConfig
from dit_attn.cli.jobs import Job
from dit_attn.cli.progress import progress_bar
from dit_attn.errors import DitAttnError, reason
from dit_attn.pipelines.calibrate.calibration import Calibration, calibrate
from dit_attn.pipelines.calibrate.runs import RequestedRuns, layer_count, sparse_runs
from dit_attn.pipelines.calibrate.sensitivity import CalibrationPlan, RunItem
from dit_attn.pipelines.measurement_log import MeasurementLog
from dit_attn.pipelines.output import batch_of
from dit_attn.pipelines.run import Answers
from dit_attn.processors.methods.sparse import SparseMethod

MEASURED = "measurements.jsonl"


def description(config: CalibrateConfig) -> dict[str, Any]:
    """Return what is measured, on what, as JSON values."""
    plan, live = config.plan, config.new_run()
    budget = {"cost": config.cost, "error": config.error}
    return {
        **{key: value for key, value in live.setup.items() if key != "methods" and value not in (None, [])},
        "device": live.facts["device"],
        **({} if config.engine is None else {"engine": str(config.engine)}),
        "method": plan.method.to_dict(),
        "call": config.items[0].call,
        "steps": config.steps,
        "parts": plan.parts,
        "every": plan.step_stride,
        "ladder": list(plan.densities),
        **({"by_head": True} if plan.by_head else {}),
        "budget": {name: value for name, value in budget.items() if value is not None},
        "calibrated_on": [{"prompt": job.prompt, "seed": job.seed} for job in config.items],
        "checked_on": [{"prompt": job.prompt, "seed": job.seed} for job in config.check],
        "command": live.facts["command"],
    }


def item_name(job: Job) -> str:
    """Return the name of an item in the log of measurements."""
    return f"{job_files.slug(job.prompt, 24)}_s{job.seed}_{job.digest({})[:10]}"


def run_all(config: CalibrateConfig) -> dict[str, Any]:
    """Measure, choose, check, write and upload; return what ``--json`` prints.

    Raises:
        DitAttnError: an output that cannot be written, measurements of another setup, a budget that cannot be met.
    """
    plan = config.plan
    outputs.prepare_folder(config.folder)
    setup = {**config.new_run().setup, "parts": plan.parts, "ladder": plan.densities, "every": plan.step_stride}
    setup |= {"by_head": True} if plan.by_head else {}
    log = MeasurementLog(config.folder / MEASURED, setup, config.resume)
    jobs = {item_name(job): job for job in (*config.items, *config.check)}
    items, check = ([item_name(job) for job in part] for part in (config.items, config.check))
    pipe = config.load.source.without_weights if config.engine is not None else _loaded(config, [*jobs.values()])
    layers = layer_count(pipe)
    runs = [key for item in items for key in (plan.local_key(item), *sparse_runs(item, plan, layers))]
    missing = sum(key not in log.rows for key in runs)
    missing += (3 if plan.by_head else 2) * len(check)  # those of the check count as missing
    with progress_bar(missing, "calibrate", "run", least=1) as bar, _answers(config, jobs, missing) as answers:
        log.on_result = lambda key: bar.update()
        found = calibrate(
            pipe, item_runner(pipe, jobs), items, plan, log, check=check, cost=config.cost, error=config.error,
            provenance=_provenance(config), on_progress=lambda text: bar.set_postfix_str(short_label(text, [*jobs])),
            answers=answers,
        )  # fmt: skip
    return _written(config, found)


def _loaded(config: CalibrateConfig, jobs: list[Job]) -> Any:
    pipe = load_pipeline.load_pipeline(config.load)
    job_files.check_inputs(jobs, pipe)
    return pipe


def _answers(config: CalibrateConfig, jobs: dict[str, Job], most: int) -> AbstractContextManager[Answers | None]:
    """What makes the runs on workers; ``None`` for this process."""
    if config.engine is None:
        return nullcontext()
    plan = {name: getattr(config.plan, name) for name in ("parts", "densities", "step_stride", "by_head")}
    items = {name: asdict(job) for name, job in jobs.items()}
    recipe = worker_setup.recipe_of(
        f"{__name__}:make_worker", config.options, config.new_run(), plan=plan, items=items
    )  # fmt: skip
    return config.engine.answering(recipe, config.folder, config.load.device, most)


def make_worker(settings: dict[str, Any], name: str) -> Callable[[Any, bool], Any]:
    """Load the pipeline in a worker; return the function that makes one run.

    Args:
        settings: what the runs share, the plan, the items by name, and the mark of the folder.
        name: of the worker, for messages.

    Raises:
        DitAttnError: no such model here, another one, or another folder.
    """
    run, load = worker_setup.worker_run(settings, name)
    jobs = {item: Job(**job) for item, job in settings["items"].items()}
    plan = CalibrationPlan(cast(SparseMethod, run.methods[0]), **settings["plan"])
    pipe = load_pipeline.load_pipeline(load)
    job_files.check_inputs([*jobs.values()], pipe)
    return worker_setup.explained(RequestedRuns(pipe, item_runner(pipe, jobs), plan))


def short_label(text: str, items: list[str]) -> str:
    """Return what a bar says of a run: the number of the item in place of its name, which would take the bar's room."""
    name, _, what = text.partition(": ")
    return f"item {items.index(name) + 1}: {what}" if name in items else text


def item_runner(pipe: Any, jobs: dict[str, Job]) -> RunItem:
    """Return a function that runs an item by its name and returns its final latents."""

    def run_item(item: str) -> torch.Tensor:
        job = jobs[item]
        images = {key: job_files.load_images(path, key) for key, path in job.images().items()}
        generator = torch.Generator("cpu").manual_seed(job.seed)
        made = batch_of(pipe(prompt=job.prompt, generator=generator, output_type="latent", **{**job.call, **images}))
        if made is None or not isinstance(made.items, torch.Tensor):
            raise DitAttnError(f"{type(pipe).__name__} gives no latents, which calibration compares")
        return made.items

    return run_item


def _provenance(config: CalibrateConfig) -> dict[str, Any]:
    from dit_attn.models.evaluate import current_commit
    from dit_attn.models.export import environment

    about = description(config)
    about["command"] = about["command"].replace(str(Path.home()), "~")
    return {**about, "commit": current_commit(), "environment": environment()}


def _written(config: CalibrateConfig, found: Calibration) -> dict[str, Any]:
    from dit_attn.processors.methods.saved import FILE_NAME

    path = config.folder / FILE_NAME
    outputs.write_json(found.method.to_dict(), path)
    record = {
        **(found.method.calibration or {}),
        "densities": found.densities.tolist(),
        "file": str(path),
    }
    if config.push_to_hub:
        record["hub"] = _upload(found, config.push_to_hub, path)
    return record


def _upload(found: Calibration, repo: str, path: Path) -> str:
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return found.method.push_to_hub(repo)
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise DitAttnError(
            f"cannot upload to {repo} ({reason(error)}); the result is in {path}: check the name, the network and "
            "`hf auth login`, then run the same command with --resume"
        ) from error
