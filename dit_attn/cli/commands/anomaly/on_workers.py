"""Jobs of ``dit-attn anomaly`` on workers: they write the images, and rows and figures come back."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from dit_attn.cli import run_record, worker_setup
from dit_attn.cli.commands.anomaly import inputs
from dit_attn.cli.commands.anomaly.benchmark_plan import plan_of
from dit_attn.cli.commands.anomaly.ingredients import Ingredients, OnProgress, ingredients_of, pair_maker
from dit_attn.cli.engines import EngineConfig
from dit_attn.cli.load_pipeline import LoadConfig
from dit_attn.cli.options import Options
from dit_attn.errors import DitAttnError
from dit_attn.pipelines.anomaly.benchmark.benchmark import Benchmark
from dit_attn.pipelines.anomaly.quotas import fill_quotas
from dit_attn.pipelines.measurement_log import MeasurementLog
from dit_attn.pipelines.run import Answers

_OF_THE_COMMAND = ("workers", "engine", "json", "config", "resume")


def answering(
    options: Options, engine: EngineConfig | None, maker: str, output: Path, most: int, **settings: Any
) -> AbstractContextManager[Answers | None]:
    """Return what does the requests of a job on workers, as a context manager; ``None`` for this process.

    Args:
        options: the flags.
        engine: the workers.
        maker: function of this module that gets a worker ready.
        output: folder of the files.
        most: requests at a time; no more workers than that are started.
        settings: what that needs besides the flags.
    """
    if engine is None:
        return nullcontext()
    load = LoadConfig.from_options(options)
    run = run_record.new_run(load, (), output, options.argv)
    values = {name: value for name, value in options.values.items() if name not in _OF_THE_COMMAND}
    values |= {"dtype": run.setup["dtype"], "output": str(output)}
    recipe = worker_setup.recipe_of(f"{__name__}:{maker}", options, run, values=values, **settings)
    return engine.answering(recipe, output, load.device, most)


def make_pairs(
    options: Options, engine: EngineConfig, output: Path, given: Ingredients, on_progress: OnProgress
) -> dict[str, Any]:
    """Make the pairs of ``anomaly generate`` on workers; return the summary.

    Args:
        options: the flags.
        engine: the workers.
        output: folder of the run.
        given: what pairs are made of.
        on_progress: callback(finished, wanted, rejected).

    Raises:
        JobFailed: a batch is parked.
        DitAttnError: no worker can do anything.
    """
    config, controls = inputs.generate_config(options), options.get("controls", 4)
    most = -(-sum(given.counts.values()) // config.batch)
    with answering(options, engine, "make_painter", output, most, digest=given.digest()) as answers:
        assert answers is not None
        return fill_quotas(
            output, given.counts, config, given.concept, answers, controls=controls, on_progress=on_progress
        )


def make_painter(settings: dict[str, Any], name: str) -> Callable[[Any, bool], Any]:
    """Load the pipeline in a worker; return the function that makes one batch of pairs.

    Args:
        settings: the flags, a hash of what pairs are made of, and the mark of the folder.
        name: of the worker, for messages.

    Raises:
        DitAttnError: no such model, concept, masks or images here, others, or another folder.
    """
    run, _ = worker_setup.worker_run(settings, name)
    options = Options(settings["values"])
    given = ingredients_of(options)
    if given.digest() != settings["digest"]:
        raise DitAttnError(
            f"{name} has another concept, other masks or other normal images than the command; put them into a folder "
            "that all machines share"
        )
    assert isinstance(run.folder, Path)  # addresses are refused
    return worker_setup.explained(pair_maker(options, run.folder, given))


def make_trials(settings: dict[str, Any], name: str) -> Callable[[Any, bool], Any]:
    """Load the pipeline in a worker; return the function that measures one task and seed of ``anomaly benchmark``.

    Args:
        settings: the flags, and the mark of the folder.
        name: of the worker, for messages.

    Raises:
        DitAttnError: no such model or images here, another model, or another folder.
    """
    worker_setup.worker_run(settings, name)
    options = Options(settings["values"])
    plan = plan_of(options)
    config, backbone = plan.config(options), inputs.load_backbone(options)
    trials = Benchmark(backbone, plan.tasks, config, plan.output, MeasurementLog(), model=options["model"])
    return worker_setup.explained(trials.answer)
