"""The parts of ``dit-attn compare``: make what is missing, record it in sidecars, write the results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

from dit_attn import files
from dit_attn.cli import jobs as job_files
from dit_attn.cli import load_pipeline as load
from dit_attn.cli import outputs, run_record, runner
from dit_attn.cli.commands.compare.config import CompareConfig, job_of
from dit_attn.cli.jobs import Job
from dit_attn.cli.progress import progress_bar
from dit_attn.errors import RunStopped
from dit_attn.eval.report.compare_page import page
from dit_attn.pipelines.compare import comparison as compare
from dit_attn.pipelines.compare import metrics
from dit_attn.pipelines.compare.comparison import Comparison
from dit_attn.pipelines.compare.records import ItemResult, Variant
from dit_attn.remote import Place, place_of, relative_to

Done = dict[tuple[str, int], ItemResult]  # results that are there, by (label, index)


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


def finish(
    config: CompareConfig, items: list[ItemResult], maps: dict[str, Any], seconds: float, device: str
) -> dict[str, Any]:
    """Measure the metrics, write ``results.json`` and ``report.html``; return the results."""
    comparison = Comparison(config.variants, items)
    comparison.metrics = measure(config, comparison.results)
    results = results_of(config, comparison, seconds) | {"device": device}
    results["maps"] = {v.label: maps[v.label] for v in config.variants if v.label in maps}
    outputs.write_json(results, config.folder / "results.json")
    outputs.write_text(page(results, config.folder, config.shown), config.folder / "report.html")
    return results


def load_pipeline(config: CompareConfig) -> Any:
    """Load the pipeline and check the inputs of the jobs with it.

    Raises:
        DitAttnError: weights that cannot be loaded, inputs it does not take.
    """
    pipe = load.load_pipeline(config.load.for_jobs(config.jobs))
    job_files.check_inputs(config.jobs, pipe)
    return pipe


def measure(config: CompareConfig, items: list[ItemResult]) -> dict[str, dict[str, dict[str, Any]]]:
    """Compute the metrics from the files in the folder, so that they come out the same after ``--resume``."""

    def read(item: ItemResult) -> Any:
        return outputs.read_media(config.folder / str(item.file)).frames

    return metrics.measure_metrics(config.metrics, items, read, config.networks, config.load.device)


def find_results(config: CompareConfig, wanted: Sequence[Job]) -> Done:
    """Find the results of an earlier run of the same jobs, by (label, index)."""
    found = {}
    by_index = {job.index: job for job in wanted}
    for variant in config.variants:
        label, run = variant.label, config.runs[variant.label]
        jobs = [job_of(variant, job) for job in wanted]
        for index, one in runner.find_finished(jobs, run.folder, run.setup).items():
            result = ItemResult.from_json(one.sidecar.get("compare"))
            if result is not None and result.index == index and result.error is None:
                job = by_index[index]
                file = relative_to(one.path, config.folder)  # what a sidecar says may lead out of the folder
                found[label, index] = replace(result, variant=label, prompt=job.prompt, seed=job.seed, file=file)
    return found


def make_all(config: CompareConfig, pipe: Any, done: Done) -> list[ItemResult]:
    """Make every item by every variant, in the order of the items. What is in ``done`` is not made again; dense is,
    for the times of the others."""
    count = len(config.planned) * len(config.variants) - len(done)
    shares = attention_shares(config.planned, pipe) if count else {}
    if count:
        warm_up(config, pipe)
    results: list[ItemResult] = []
    with progress_bar(count, "compare") as bar:
        for job in config.planned:
            results += make_job(config, pipe, job, done, shares.get(job.index), bar.update)
    return results


def make_job(
    config: CompareConfig,
    pipe: Any,
    job: Job,
    done: Done,
    share: float | None,
    on_item: Callable[[], Any] = lambda: None,
) -> list[ItemResult]:
    """Make one job by every variant that is not in ``done``; return the results of all variants."""
    missing = [v for v in config.variants if (v.label, job.index) not in done]
    made = {}
    if missing:
        for item in run_round(config, pipe, job, compare.with_dense(missing), done, share):
            made[item.variant] = item
            if (item.variant, job.index) not in done:
                on_item()
    return [done.get((v.label, job.index)) or made[v.label] for v in config.variants]


def run_round(
    config: CompareConfig,
    pipe: Any,
    job: Job,
    variants: tuple[Variant, ...],
    done: Done,
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
        return relative_to(place_of(str(result.file)), config.folder)

    blank = ItemResult("", job.index, job.prompt, job.seed, attention_share=share)
    for item in compare.run_round(pipe, blank, variants, make, save):
        if item.file is not None and item.error is None and (item.variant, job.index) not in done:
            add_to_sidecar(config.folder / item.file, item)
        yield item


def add_to_sidecar(path: Place, item: ItemResult) -> None:
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


def attention_shares(jobs: Sequence[Job], pipe: Any) -> dict[int, float | None]:
    """Return attention's share of the operations of a dense step, by index of the job; jobs may differ in size."""
    sizes = {job.index: tuple(job.call.get(key) for key in ("height", "width", "num_frames")) for job in jobs}
    calls = {sizes[job.index]: job.call for job in jobs}
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
