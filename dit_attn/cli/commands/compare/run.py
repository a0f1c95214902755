"""The work behind ``dit-attn compare``: make what is missing, record it in sidecars, write the results."""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from dit_attn import files
from dit_attn.cli import jobs as job_files
from dit_attn.cli import load_pipeline as load
from dit_attn.cli import outputs, run_record, runner
from dit_attn.cli.commands.compare import maps as compare_maps
from dit_attn.cli.commands.compare import match as compare_match
from dit_attn.cli.commands.compare.config import CompareConfig, job_of
from dit_attn.cli.jobs import Job
from dit_attn.cli.progress import progress_bar
from dit_attn.errors import RunStopped
from dit_attn.eval.report.compare_page import page
from dit_attn.pipelines.compare import comparison as compare
from dit_attn.pipelines.compare import metrics
from dit_attn.pipelines.compare.comparison import Comparison
from dit_attn.pipelines.compare.records import ItemResult, Variant


def plan(config: CompareConfig) -> dict[str, Any]:
    """Return what would be made, as JSON values."""
    return {
        "folder": str(config.folder),
        "command": config.dense.facts["command"],
        "variants": [
            {"label": v.label, "methods": [m.to_dict() for m in v.methods], "call": dict(v.call)}
            for v in config.variants
        ],
        "items": [{"name": j.stem, "prompt": j.prompt, "seed": j.seed, "call": j.call} for j in config.jobs],
        "setup": {key: value for key, value in config.dense.setup.items() if key != "methods"},
    }


def run_all(config: CompareConfig) -> dict[str, Any]:
    """Make what is missing and write ``results.json`` and ``report.html``; return the results.

    Raises:
        DitAttnError: the folder cannot be written, weights that cannot be loaded.
        KeyboardInterrupt: every finished item is saved, no half file is left.
    """
    outputs.prepare_folder(config.folder)
    files.claim(config, config.folder, "compare", "comparing")  # the caller has it to the end
    resume, wants_maps = config.resume, config.maps
    pipe = None
    if config.match_strength:
        config, pipe = compare_match.with_matched(config, load_pipeline)
    for run in config.runs.values():
        outputs.prepare_folder(run.folder)
    done = find_results(config) if resume else {}
    maps = compare_maps.find_maps(config) if resume and wants_maps else {}
    unmapped = compare_maps.missing(config, maps) if wants_maps else []
    if pipe is None and (len(done) < len(config.jobs) * len(config.variants) or unmapped):
        pipe = load_pipeline(config)
    started = time.perf_counter()
    comparison = Comparison(config.variants, make_all(config, pipe, done))
    maps |= compare_maps.make_maps(config, pipe, unmapped)
    comparison.metrics = measure(config, comparison.results)
    results = results_of(config, comparison, time.perf_counter() - started)
    results["maps"] = {v.label: maps[v.label] for v in config.variants if v.label in maps}
    outputs.write_json(results, config.folder / "results.json")
    outputs.write_text(page(results, config.folder, config.shown), config.folder / "report.html")
    return results


def load_pipeline(config: CompareConfig) -> Any:
    """Load the pipeline and check the inputs of the jobs with it.

    Raises:
        DitAttnError: weights that cannot be loaded, inputs it does not take.
    """
    pipe = load.load_pipeline(config.load)
    job_files.check_inputs(config.jobs, pipe)
    return pipe


def measure(config: CompareConfig, items: list[ItemResult]) -> dict[str, dict[str, dict[str, Any]]]:
    """Compute the metrics from the files in the folder, so that they come out the same after ``--resume``."""

    def read(item: ItemResult) -> Any:
        return outputs.read_media(config.folder / str(item.file)).frames

    return metrics.measure_metrics(config.metrics, items, read, config.networks, config.load.device)


def find_results(config: CompareConfig) -> dict[tuple[str, int], ItemResult]:
    """Find the results of an earlier run of the same jobs, by (label, index)."""
    found = {}
    for variant in config.variants:
        label, run = variant.label, config.runs[variant.label]
        jobs = [job_of(variant, job) for job in config.jobs]
        for index, one in runner.find_finished(jobs, run.folder, run.setup).items():
            result = ItemResult.from_json(one.sidecar.get("compare"))
            if result is not None and result.index == index and result.error is None:
                job = config.jobs[index]
                file = str(one.path.relative_to(config.folder))  # what a sidecar says may lead out of the folder
                found[label, index] = replace(result, variant=label, prompt=job.prompt, seed=job.seed, file=file)
    return found


def make_all(config: CompareConfig, pipe: Any, done: dict[tuple[str, int], ItemResult]) -> list[ItemResult]:
    """Make every item by every variant, in the order of the items. What is in ``done`` is not made again; dense is,
    for the times of the others."""
    todo = {job.index: [v for v in config.variants if (v.label, job.index) not in done] for job in config.jobs}
    count = sum(len(missing) for missing in todo.values())
    shares = attention_shares(config, pipe) if count else {}
    if count:
        warm_up(config, pipe)
    results: list[ItemResult] = []
    with progress_bar(count, "compare") as bar:
        for job in config.jobs:
            missing = todo[job.index]
            made = {}
            if missing:
                variants = compare.with_dense(missing)
                for item in run_round(config, pipe, job, variants, done, shares[job.index]):
                    made[item.variant] = item
                    bar.update((item.variant, job.index) not in done)
            results += [done.get((v.label, job.index)) or made[v.label] for v in config.variants]
    return results


def run_round(
    config: CompareConfig,
    pipe: Any,
    job: Job,
    variants: tuple[Variant, ...],
    done: dict[tuple[str, int], ItemResult],
    share: float | None,
) -> Any:
    """Run one job by every variant; outputs and sidecars are saved as they come."""
    media: dict[str, outputs.Media] = {}

    def make(variant: Variant) -> tuple[Any, float]:
        found, seconds = runner.call_pipeline(pipe, job_of(variant, job))
        media["last"] = found
        return found.frames, seconds

    def save(variant: Variant, frames: Any, seconds: float) -> str | None:
        earlier = done.get((variant.label, job.index))
        if earlier is not None:
            return earlier.file
        run = config.runs[variant.label]
        run.pipe = pipe
        result = runner.save_item(run, job_of(variant, job), media["last"], seconds)
        return str(Path(str(result.file)).relative_to(config.folder))

    blank = ItemResult("", job.index, job.prompt, job.seed, attention_share=share)
    for item in compare.run_round(pipe, blank, variants, make, save):
        if item.file is not None and item.error is None and (item.variant, job.index) not in done:
            add_to_sidecar(config.folder / item.file, item)
        yield item


def add_to_sidecar(path: Path, item: ItemResult) -> None:
    """Add the figures of an item to the sidecar of its file."""
    sidecar = path.with_suffix(".json")
    with files.locked(path.parent):
        outputs.write_json({**outputs.read_sidecar(sidecar), "compare": asdict(item)}, sidecar)


def warm_up(config: CompareConfig, pipe: Any) -> None:
    """Make one short call of every variant, which is not timed: the first call of a process pays for set-up."""
    job = config.jobs[0]
    short = {"num_inference_steps": 1} if "num_inference_steps" in job.call else {}
    for variant in config.variants:
        mine = job_of(variant, job)
        with compare.variant_enabled(pipe, variant):
            try:
                runner.call_pipeline(pipe, replace(mine, call={**mine.call, **short}))
            except RunStopped:
                raise
            except (RuntimeError, ValueError, TypeError, NotImplementedError, AttributeError):
                continue  # it comes again with the item, and is reported there


def attention_shares(config: CompareConfig, pipe: Any) -> dict[int, float | None]:
    """Return attention's share of the operations of a dense step, by index of the job; jobs may differ in size."""
    sizes = {job.index: tuple(job.call.get(key) for key in ("height", "width", "num_frames")) for job in config.jobs}
    calls = {sizes[job.index]: job.call for job in config.jobs}
    shares = {size: compare.attention_share(pipe, call) for size, call in calls.items()}
    return {index: shares[size] for index, size in sizes.items()}


def results_of(config: CompareConfig, comparison: Comparison, seconds: float) -> dict[str, Any]:
    """Return ``results.json``: figures, items, and everything needed to repeat them."""
    from dit_attn.models.evaluate import current_commit
    from dit_attn.models.export import environment

    return {
        "what": "the same prompts and noise, dense and with methods in turns; times are ratios within rounds; 95 % "
        "intervals from resampling prompts with all their seeds (distances of sets: from leaving prompts out)",
        "command": config.dense.facts["command"],
        "commit": current_commit(),
        "versions": run_record.versions(),
        "environment": environment(),
        "device": config.dense.facts["device"],
        "model": {key: value for key, value in config.dense.setup.items() if key != "methods"},
        "call": config.jobs[0].call,
        "items": len(config.jobs),
        "prompts": len({job.prompt for job in config.jobs}),
        "metrics": list(config.metrics),
        "seconds": round(seconds, 1),
        "attention_share": comparison.attention_share,
        "headline": comparison.summary_rows(),
        "takes": [asdict(item) for item in comparison.results],
    }
