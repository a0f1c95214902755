"""The work of ``dit-attn calibrate``: load, measure what is missing, write the file, upload it."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_attn.cli import jobs as job_files
from dit_attn.cli import load_pipeline, outputs
from dit_attn.errors import DitAttnError, reason

if TYPE_CHECKING:
    import torch

    from dit_attn.cli.jobs import Job
    from dit_attn.cli.model_source import Source
    from dit_attn.cli.runner import Run
    from dit_attn.pipelines.calibrate.calibrate import Calibration
    from dit_attn.pipelines.calibrate.sensitivity import Plan, Play

MEASURED = "measurements.jsonl"
_SAME = ("height", "width", "num_frames", "num_inference_steps", "guidance_scale")


@dataclass(frozen=True)
class Setting:
    """One command, checked, before anything is loaded.

    Attributes:
        options: the flags.
        model: where the pipeline comes from.
        plan: what is measured.
        items, check: to calibrate on and to compare on.
        live: the set-up and facts of the run.
        device, dtype: of the weights.
        folder: of the result.
    """

    options: dict[str, Any]
    model: Source
    plan: Plan
    items: list[Job]
    check: list[Job]
    live: Run
    device: Any
    dtype: Any
    folder: Path


def steps_of(jobs: Sequence[Job], pipeline: Any) -> int | None:
    """Steps of a run, where the call or its default says so.

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


def description(setting: Setting) -> dict[str, Any]:
    """What is measured, on what, as JSON values."""
    plan, setup = setting.plan, setting.live.setup
    first = setting.items[0]
    return {
        **{key: value for key, value in setup.items() if key != "methods" and value not in (None, [])},
        "device": setting.live.facts["device"],
        "method": plan.method.to_dict(),
        "call": first.call,
        "steps": steps_of(setting.items, setting.model.pipeline),
        "parts": plan.parts,
        "every": plan.every,
        "ladder": list(plan.ladder),
        "budget": {name: setting.options[name] for name in ("cost", "error") if name in setting.options},
        "calibrated_on": [{"prompt": job.prompt, "seed": job.seed} for job in setting.items],
        "checked_on": [{"prompt": job.prompt, "seed": job.seed} for job in setting.check],
        "command": setting.live.facts["command"],
    }


def budget_text(options: dict[str, Any]) -> str:
    """The budget in words."""
    if "error" in options:
        return f"an error of {options['error']:g}"
    return f"a cost of {options['cost']:g}" if "cost" in options else "the cost of one density for all"


def name_of(job: Job) -> str:
    """What an item's measurements are kept under."""
    return f"{job_files.slug(job.prompt, 24)}_s{job.seed}_{job.digest({})[:10]}"


def run_all(setting: Setting) -> dict[str, Any]:
    """Measure, choose, check, write and upload; what ``--json`` prints.

    Raises:
        DitAttnError: an output that cannot be written, measurements of another set-up, a budget that cannot be met.
    """
    from dit_attn.pipelines.calibrate.calibrate import calibrate
    from dit_attn.pipelines.measurement_log import Store

    plan, options = setting.plan, setting.options
    outputs.prepare_folder(setting.folder)
    setup = {**setting.live.setup, "parts": plan.parts, "ladder": plan.ladder, "every": plan.every}
    bar = _Bar()
    store = Store(setting.folder / MEASURED, setup, options.get("resume", False), bar.told)
    pipe = load_pipeline.load_pipeline(setting.model, options, setting.device, setting.dtype)
    job_files.check_inputs([*setting.items, *setting.check], pipe)
    pipe.set_progress_bar_config(disable=True)
    jobs = {name_of(job): job for job in (*setting.items, *setting.check)}
    items, check = ([name_of(job) for job in part] for part in (setting.items, setting.check))
    with bar.over(_missing(pipe, plan, items, check, store)):
        found = calibrate(
            pipe, player(pipe, jobs), items, plan, store, check=check, cost=options.get("cost"),
            error=options.get("error"), about=_about(setting), say=bar.say,
        )  # fmt: skip
    return _written(setting, found)


def player(pipe: Any, jobs: dict[str, Job]) -> Play:
    """Makes items by name and returns their final latents."""
    import torch

    def play(item: str) -> torch.Tensor:
        job = jobs[item]
        pictures = {key: job_files.load_picture(path, key) for key, path in job.pictures().items()}
        generator = torch.Generator("cpu").manual_seed(job.seed)
        result = pipe(prompt=job.prompt, generator=generator, output_type="latent", **{**job.call, **pictures})
        latents = result.frames if getattr(result, "frames", None) is not None else result.images
        if not isinstance(latents, torch.Tensor):
            raise DitAttnError(f"{type(pipe).__name__} gives no latents, which calibration compares")
        return latents

    return play


def _missing(pipe: Any, plan: Plan, items: Sequence[str], check: Sequence[str], store: Any) -> int:
    """Measurements that are not in the store; those of the check count as missing."""
    import dit_attn
    from dit_attn.pipelines.calibrate.sensitivity import runs_of

    with dit_attn.enabled(pipe) as session:
        layers = session.layer_count
    keys = [key for item in items for key in (f"local/{item}", *runs_of(item, plan, layers))]
    return sum(key not in store.rows for key in keys) + 2 * len(check)


def _about(setting: Setting) -> dict[str, Any]:
    from dit_attn.models.evaluate import current_commit
    from dit_attn.models.export import environment

    about = description(setting)
    about["command"] = about["command"].replace(str(Path.home()), "~")
    return {**about, "commit": current_commit(), "environment": environment()}


def _written(setting: Setting, found: Calibration) -> dict[str, Any]:
    from dit_attn.processors.methods.base import FILE_NAME

    path = setting.folder / FILE_NAME
    outputs.write_json(found.method.to_dict(), path)
    record = {
        **(found.method.calibration or {}),
        "densities": found.densities.tolist(),
        "file": str(path),
    }
    repo = setting.options.get("push_to_hub")
    if repo:
        record["hub"] = _upload(found, repo, path)
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


class _Bar:
    """A progress bar over measurements with the time left; nothing where standard error is no terminal."""

    def __init__(self) -> None:
        self._bar: Any = None

    def over(self, count: int) -> Any:
        """The bar, as a context manager."""
        from tqdm import tqdm

        self._bar = tqdm(total=count, desc="calibrate", unit="run", disable=not sys.stderr.isatty() or not count)
        return self._bar

    def told(self, key: str) -> None:
        """One more is there."""
        if self._bar is not None:
            self._bar.update()

    def say(self, line: str) -> None:
        """What is being measured."""
        if self._bar is not None:
            self._bar.set_postfix_str(line, refresh=True)
