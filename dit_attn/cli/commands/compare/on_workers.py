"""A comparison on workers: an item with all its variants is one task, so that its times are of one worker."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import asdict
from typing import Any

from dit_attn.cli import engines
from dit_attn.cli.commands.compare import maps, run
from dit_attn.cli.commands.compare.config import CompareConfig
from dit_attn.cli.commands.compare.run import Done
from dit_attn.cli.engines import EngineConfig
from dit_attn.cli.jobs import Job
from dit_attn.cli.progress import progress_bar
from dit_attn.cli.worker_setup import check_same_setup
from dit_attn.pipelines.compare.records import ItemResult, Variant
from dit_attn.pipelines.run import Outcome, Recipe, Task

_MAPS = -1  # key of the task that makes the maps of the first item


def make_all(
    config: CompareConfig, engine: EngineConfig, done: Done, unmapped: list[Variant]
) -> tuple[list[ItemResult], dict[str, Any], str]:
    """Make what is missing on workers; return the items in order, the maps that were missing, and the devices.

    Raises:
        DitAttnError: no worker can do anything.
        RunStopped: outputs cannot be written.
    """
    todo = [job for job in config.planned if any((v.label, job.index) not in done for v in config.variants)]
    made: dict[int, list[ItemResult]] = {}
    found: dict[str, Any] = {}
    devices: dict[str, None] = {}
    tasks = _tasks(config, todo, done, unmapped)
    with progress_bar(len(todo), "compare") as bar, closing(_outcomes(config, engine, tasks)) as outcomes:
        for outcome in outcomes:
            if outcome.task.key == _MAPS:
                found = {v.label: {"failed": outcome.error} for v in unmapped}
                found = found if outcome.result is None else outcome.result["maps"]
            elif outcome.result is None:
                made[outcome.task.key] = _parked(config, outcome, done)
            else:
                made[outcome.task.key] = [ItemResult(**item) for item in outcome.result["items"]]
            devices |= {} if outcome.result is None else {outcome.result["device"]: None}
            bar.update(outcome.task.key != _MAPS)
    everything = [_found(config, job, done) if job.index not in made else made[job.index] for job in config.planned]
    return [item for items in everything for item in items], found, ", ".join(devices) or config.dense.facts["device"]


def _tasks(config: CompareConfig, todo: list[Job], done: Done, unmapped: list[Variant]) -> list[Task]:
    tasks = [Task(job.index, {"job": asdict(job), "done": _known(config, job, done)}) for job in todo]
    return tasks + ([Task(_MAPS, {"maps": [variant.label for variant in unmapped]})] if unmapped else [])


def _outcomes(config: CompareConfig, engine: EngineConfig, tasks: list[Task]) -> Generator[Outcome, None, None]:
    if tasks:
        setups = {label: one.setup for label, one in config.runs.items()}
        settings = {"config": config.to_dict(config.jobs[:1]), "setups": setups}
        recipe = Recipe(f"{__name__}:make_worker", settings, os.getcwd())
        yield from engine.run(recipe, config.folder, config.load.device, tasks, len(tasks))


def _known(config: CompareConfig, job: Job, done: Done) -> list[dict[str, Any]]:
    return [asdict(item) for item in _found(config, job, done)]


def _found(config: CompareConfig, job: Job, done: Done) -> list[ItemResult]:
    return [done[v.label, job.index] for v in config.variants if (v.label, job.index) in done]


def _parked(config: CompareConfig, outcome: Outcome, done: Done) -> list[ItemResult]:
    """Return the results of an item that no worker could make: those that are there, and failures."""
    job = Job(**outcome.task.content["job"])
    return [
        done.get((v.label, job.index)) or ItemResult(v.label, job.index, job.prompt, job.seed, error=outcome.error)
        for v in config.variants
    ]


def make_worker(settings: dict[str, Any], name: str) -> Callable[[Any, bool], Any]:
    """Load the pipeline in a worker and warm it up; return the function that makes one item by all variants.

    Args:
        settings: the configuration, what decides the outputs of each variant, and the mark of the folder.
        name: of the worker, for the sidecars.

    Raises:
        DitAttnError: no such model here, another one, or another folder.
    """
    config = CompareConfig.from_dict(settings["config"])
    engines.check_marked(config.folder, settings["mark"], name)
    for label, one in config.runs.items():
        check_same_setup(one, settings["setups"][label], name)
        one.facts["worker"] = name
    pipe = run.load_pipeline(config)
    run.warm_up(config, pipe)
    device = config.dense.facts["device"]

    def work(content: Any, again: bool) -> Any:
        if "maps" in content:
            variants = [variant for variant in config.variants if variant.label in content["maps"]]
            return {"device": device, "maps": maps.make_maps(config, pipe, variants)}
        job = Job(**content["job"])
        done = {(item["variant"], job.index): ItemResult(**item) for item in content["done"]}
        if again:  # the worker before may have died after some of the variants
            done |= run.find_results(config, [job])
        share = run.attention_shares([job], pipe)[job.index]
        return {"device": device, "items": [asdict(item) for item in run.make_job(config, pipe, job, done, share)]}

    return work
