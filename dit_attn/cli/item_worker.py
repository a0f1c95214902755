"""Items of ``generate`` and ``edit`` on workers: what a worker does, and the command's side of it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, replace
from typing import Any

from dit_attn.cli import outputs, run_record, runner, worker_setup
from dit_attn.cli.engines import EngineConfig
from dit_attn.cli.high_resolution import TwoStages
from dit_attn.cli.jobs import Job, check_inputs
from dit_attn.cli.load_pipeline import LoadConfig
from dit_attn.cli.options import Options
from dit_attn.cli.progress import progress_bar
from dit_attn.cli.run_record import ItemResult, Run
from dit_attn.cli.runner import Items
from dit_attn.errors import RunStopped
from dit_attn.pipelines.run import JobFailed, Recipe, Task
from dit_attn.remote import place_of


def recipe_of(options: Options, run: Run, load: LoadConfig) -> Recipe:
    """Return how a worker gets ready for the items of a run, as JSON values.

    Args:
        options: the flags.
        run: what the items share; its precision holds for all machines.
        load: how the pipeline is loaded.
    """
    stages = None if run.stages is None else {**asdict(run.stages), "methods": None}
    return worker_setup.recipe_of(f"{__name__}:make_worker", options, run, stages=stages, parts=load.parts)


def make_worker(settings: dict[str, Any], name: str) -> Callable[[Any, bool], Any]:
    """Load the pipeline in a worker; return the function that makes one item.

    Args:
        settings: those of :func:`recipe_of`, and the mark of the folder.
        name: of the worker, for the sidecars.

    Raises:
        DitAttnError: no such model here, another one, or another folder.
    """

    def stages(methods: tuple[Any, ...]) -> TwoStages | None:
        given = settings["stages"]
        if given is None:
            return None
        height, width = given["native"]
        return TwoStages((height, width), given["settings"], methods, given["resume"])

    run, load = worker_setup.worker_run(settings, name, stages)
    run_record.load_run(run, replace(load, parts=settings["parts"] and tuple(settings["parts"])))

    def work(content: Any, again: bool) -> Any:
        return asdict(_make(run, Job(**content), again))

    return work


def _make(run: Run, job: Job, again: bool) -> ItemResult:
    if again:  # the worker before may have died between the file and its answer
        done = runner.find_finished([job], run.folder, run.setup)
        if done:
            return replace(runner.skipped_item(job, done[job.index]), status="done")
    try:
        check_inputs([job], run.pipe)
        return runner.make_item(run, job)[0]
    except RunStopped:
        raise
    except Exception as error:
        raise JobFailed(*runner.explain_failure(error)) from error


def run_on_engine(
    run: Run, items: Items, on_item: Callable[[str], None], engine: EngineConfig, recipe: Recipe, device: Any
) -> None:
    """Make every job's output on workers, see :func:`~dit_attn.cli.runner.run_jobs`.

    Args:
        run, items, on_item: as there.
        engine, recipe, device: the workers, how they get ready, and the device of the flags.

    Raises:
        DitAttnError: no worker can do anything.
        RunStopped: outputs cannot be written; what is finished stays.
        KeyboardInterrupt: no half file is left.
    """
    with progress_bar(len(items.jobs), "items") as bar:

        def add(result: ItemResult) -> None:
            shown = items.with_sheet and result.file is not None
            runner.add_result(run, result, outputs.read_media(place_of(str(result.file))) if shown else None)
            bar.clear()
            on_item(runner.describe_item(result, items.total))
            bar.update()

        for job in items.jobs:
            if job.index in items.done:
                add(runner.skipped_item(job, items.done[job.index]))
        todo = {job.index: job for job in items.todo}
        if not todo:
            return
        tasks = (Task(job.index, asdict(job)) for job in todo.values())
        with closing(engine.run(recipe, run.folder, device, tasks, len(todo))) as outcomes:
            for outcome in outcomes:
                if outcome.error is not None:
                    add(runner.failed_item(todo[outcome.task.key], outcome.error))
                else:
                    add(ItemResult(**{**outcome.result, "warnings": tuple(outcome.result["warnings"])}))
