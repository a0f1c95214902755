"""The work behind ``dit-attn compare``: making what is missing, remembering it in sidecars, writing the results."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from dit_attn.cli import jobs as job_files
from dit_attn.cli import load_pipeline as load
from dit_attn.cli import outputs, runner
from dit_attn.cli.commands.compare import maps as compare_maps
from dit_attn.cli.commands.compare import match as compare_match
from dit_attn.cli.commands.compare.config import Setting
from dit_attn.cli.jobs import Job
from dit_attn.errors import RunStopped
from dit_attn.eval.extractors import CLIP_DEFAULT, Networks
from dit_attn.eval.report.compare_page import page
from dit_attn.pipelines.compare import comparison as compare
from dit_attn.pipelines.compare import metrics
from dit_attn.pipelines.compare.comparison import Comparison
from dit_attn.pipelines.compare.records import Take, Variant

_WEIGHTS = ("inception", "lpips_weights")
_TAKE = {spec.name for spec in fields(Take)}


def plan(setting: Setting) -> dict[str, Any]:
    """What would be made, as JSON values."""
    return {
        "folder": str(setting.folder),
        "command": setting.command,
        "variants": [
            {"label": v.label, "methods": [m.to_dict() for m in v.methods], "call": dict(v.call)}
            for v in setting.variants
        ],
        "items": [{"name": j.stem, "prompt": j.prompt, "seed": j.seed, "call": j.call} for j in setting.jobs],
        "setup": {key: value for key, value in setting.first.setup.items() if key != "methods"},
    }


def run_all(setting: Setting) -> dict[str, Any]:
    """Make what is missing and write ``results.json`` and ``report.html``; the results.

    Raises:
        DitAttnError: the folder cannot be written, weights that cannot be loaded.
        KeyboardInterrupt: every finished item is kept, no half file is left.
    """
    outputs.prepare_folder(setting.folder)
    resume, wants_maps = setting.options.get("resume"), setting.options.get("maps", True)
    pipe = None
    if setting.options.get("match_strength"):
        setting, pipe = compare_match.with_matched(setting, load_pipeline)
    for run in setting.runs.values():
        outputs.prepare_folder(run.folder)
    done = find_takes(setting) if resume else {}
    maps = compare_maps.find_maps(setting) if resume and wants_maps else {}
    unmapped = compare_maps.missing(setting, maps) if wants_maps else []
    if pipe is None and (len(done) < len(setting.jobs) * len(setting.variants) or unmapped):
        pipe = load_pipeline(setting)
    started = time.perf_counter()
    comparison = Comparison(setting.variants, make_all(setting, pipe, done))
    maps |= compare_maps.make_maps(setting, pipe, unmapped)
    comparison.metrics = measure(setting, comparison.takes)
    results = results_of(setting, comparison, time.perf_counter() - started)
    results["maps"] = {v.label: maps[v.label] for v in setting.variants if v.label in maps}
    outputs.write_json(results, setting.folder / "results.json")
    outputs.write_text(page(results, setting.folder, setting.options.get("show", 24)), setting.folder / "report.html")
    return results


def load_pipeline(setting: Setting) -> Any:
    """The pipeline, quiet, with the inputs of the jobs checked.

    Raises:
        DitAttnError: weights that cannot be loaded, inputs it does not take.
    """
    pipe = load.load_pipeline(setting.model, setting.options, setting.device, setting.dtype)
    pipe.set_progress_bar_config(disable=True)
    job_files.check_inputs(setting.jobs, pipe)
    return pipe


def networks(options: dict[str, Any]) -> Networks:
    """Where the networks of the metrics are, by the flags."""
    inception, lpips = (Path(options[key]).expanduser() if options.get(key) else None for key in _WEIGHTS)
    return Networks(inception, options.get("clip", CLIP_DEFAULT), options.get("lpips", "alex"), lpips_weights=lpips)


def measure(setting: Setting, takes: list[Take]) -> dict[str, dict[str, dict[str, Any]]]:
    """The metrics, from the files in the folder, so that they come out the same after ``--resume``."""

    def read(take: Take) -> Any:
        return outputs.read_media(setting.folder / str(take.file)).frames

    names = setting.options["metrics"]
    return metrics.measure(names, takes, read, networks(setting.options), setting.device)


def find_takes(setting: Setting) -> dict[tuple[str, int], Take]:
    """Takes of an earlier run of the same jobs, by (label, index)."""
    found = {}
    for variant in setting.variants:
        label, run = variant.label, setting.runs[variant.label]
        jobs = [setting.job_of(variant, job) for job in setting.jobs]
        for index, path in runner.find_finished(jobs, run.folder, run.setup).items():
            data = outputs.read_sidecar(path.with_suffix(".json")).get("compare")
            if isinstance(data, dict) and set(data) == _TAKE and data["index"] == index:
                found[label, index] = Take(**{**data, "variant": label})
    return found


def make_all(setting: Setting, pipe: Any, done: dict[tuple[str, int], Take]) -> list[Take]:
    """Every take, in the order of the items. What is in ``done`` is not made again; dense is, to take times against."""
    from tqdm import tqdm

    todo = {job.index: [v for v in setting.variants if (v.label, job.index) not in done] for job in setting.jobs}
    count = sum(len(missing) for missing in todo.values())
    shares = attention_shares(setting, pipe) if count else {}
    if count:
        warm_up(setting, pipe)
    takes: list[Take] = []
    bar = tqdm(total=count, desc="compare", unit="item", disable=not sys.stderr.isatty() or count < 2)
    with bar:
        for job in setting.jobs:
            missing = todo[job.index]
            made = {}
            if missing:
                round_ = compare.with_dense(missing)
                for take in play(setting, pipe, job, round_, done, shares[job.index]):
                    made[take.variant] = take
                    bar.update((take.variant, job.index) not in done)
            takes += [done.get((v.label, job.index)) or made[v.label] for v in setting.variants]
    return takes


def play(
    setting: Setting,
    pipe: Any,
    job: Job,
    round_: tuple[Variant, ...],
    done: dict[tuple[str, int], Take],
    share: float | None,
) -> Any:
    """One round of a job; outputs and sidecars are saved as they come."""
    media: dict[str, outputs.Media] = {}

    def make(variant: Variant) -> tuple[Any, float]:
        found, seconds = runner.call_pipeline(pipe, setting.job_of(variant, job))
        media["last"] = found
        return found.frames, seconds

    def keep(variant: Variant, frames: Any, seconds: float) -> str | None:
        earlier = done.get((variant.label, job.index))
        if earlier is not None:
            return earlier.file
        run = setting.runs[variant.label]
        run.pipe = pipe
        result = runner.save_item(run, setting.job_of(variant, job), media["last"], seconds)
        return str(Path(str(result.file)).relative_to(setting.folder))

    blank = Take("", job.index, job.prompt, job.seed, attention_share=share)
    for take in compare.play_round(pipe, blank, round_, make, keep):
        if take.file is not None and take.error is None and (take.variant, job.index) not in done:
            remember(setting.folder / take.file, take)
        yield take


def remember(path: Path, take: Take) -> None:
    """Add a take's figures to the sidecar of its file."""
    sidecar = path.with_suffix(".json")
    outputs.write_json({**outputs.read_sidecar(sidecar), "compare": asdict(take)}, sidecar)


def warm_up(setting: Setting, pipe: Any) -> None:
    """One short call of every competitor, which is not timed: the first call of a process pays for set-up."""
    job = setting.jobs[0]
    short = {"num_inference_steps": 1} if "num_inference_steps" in job.call else {}
    for variant in setting.variants:
        mine = setting.job_of(variant, job)
        with compare.on(pipe, variant):
            try:
                runner.call_pipeline(pipe, replace(mine, call={**mine.call, **short}))
            except RunStopped:
                raise
            except (RuntimeError, ValueError, TypeError, NotImplementedError, AttributeError):
                continue  # it comes again with the item, and is reported there


def attention_shares(setting: Setting, pipe: Any) -> dict[int, float | None]:
    """Attention's part of the operations of a dense step of every job, by index; jobs may differ in size."""
    sizes = {job.index: tuple(job.call.get(key) for key in ("height", "width", "num_frames")) for job in setting.jobs}
    calls = {sizes[job.index]: job.call for job in setting.jobs}
    shares = {size: compare.share_of_attention(pipe, call) for size, call in calls.items()}
    return {index: shares[size] for index, size in sizes.items()}


def results_of(setting: Setting, comparison: Comparison, seconds: float) -> dict[str, Any]:
    """``results.json``: figures, takes, and everything needed to repeat them."""
    from dit_attn.models.evaluate import current_commit
    from dit_attn.models.export import environment

    return {
        "what": "the same prompts and noise, dense and with methods in turns; times are ratios within rounds; 95 % "
        "intervals from resampling prompts with all their seeds (distances of sets: from leaving prompts out)",
        "command": setting.command,
        "commit": current_commit(),
        "versions": runner.versions(),
        "environment": environment(),
        "device": setting.first.facts["device"],
        "model": {key: value for key, value in setting.first.setup.items() if key != "methods"},
        "call": setting.jobs[0].call,
        "items": len(setting.jobs),
        "prompts": len({job.prompt for job in setting.jobs}),
        "metrics": list(setting.options["metrics"]),
        "seconds": round(seconds, 1),
        "attention_share": comparison.attention_share,
        "headline": comparison.headline(),
        "takes": [asdict(take) for take in comparison.takes],
    }
