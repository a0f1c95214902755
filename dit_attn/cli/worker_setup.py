"""How a worker of any command gets ready: the recipe, and the checks before weights are loaded."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dit_attn.cli import engines, outputs, run_record, runner
from dit_attn.cli.load_pipeline import LoadConfig
from dit_attn.cli.options import MODEL, RUN, WEIGHTS, Options
from dit_attn.cli.run_record import Run
from dit_attn.errors import DitAttnError, RunStopped
from dit_attn.pipelines.run import JobFailed, Recipe
from dit_attn.remote import place_of

if TYPE_CHECKING:
    from dit_attn.cli.high_resolution import TwoStages
    from dit_attn.processors.methods.base import Method

    StagesOf = Callable[[tuple[Method, ...]], TwoStages | None]


def recipe_of(maker: str, options: Options, run: Run, **settings: Any) -> Recipe:
    """Return how a worker gets ready, as JSON values.

    Args:
        maker: ``"module:function"``.
        options: the flags.
        run: what the work shares; its precision holds for all machines.
        settings: what the maker needs besides.
    """
    names = [flag.dest for flag in (*MODEL, *WEIGHTS, *RUN)]
    shared = {
        "load": {**options.pick(*names), "dtype": run.setup["dtype"]},
        "methods": [method.to_dict() for method in run.methods],
        "folder": str(run.folder),
        "argv": list(options.argv),
        "fps": run.fps,
        "setup": run.setup,
    }
    return Recipe(maker, {**shared, **settings}, os.getcwd())


def worker_run(settings: dict[str, Any], name: str, stages: StagesOf | None = None) -> tuple[Run, LoadConfig]:
    """Return the run of a recipe in a worker, without its pipeline, and how that is loaded.

    Args:
        settings: those of :func:`recipe_of`, and the mark of the folder.
        name: of the worker, for the sidecars.
        stages: returns the two stages of every item, from the methods.

    Raises:
        DitAttnError: no such model here, another one, or another folder.
    """
    from dit_attn.processors.methods.base import Method

    folder = place_of(settings["folder"])
    engines.check_marked(folder, settings["mark"], name)
    load = LoadConfig.from_options(Options(settings["load"]), modular=True)
    methods = tuple(Method.from_dict(data) for data in settings["methods"])
    two = stages(methods) if stages is not None else None
    run = run_record.new_run(load, methods, folder, settings["argv"], settings["fps"], stages=two)
    check_same_setup(run, settings["setup"], name)
    run.facts["worker"] = name
    return run, load


def check_same_setup(run: Run, expected: dict[str, Any], name: str) -> None:
    """Refuse a worker whose items would be others: another model under the same name, another method file ...

    Raises:
        DitAttnError: so it is.
    """
    mine, wanted = json.loads(outputs.to_json(run.setup)), json.loads(outputs.to_json(expected))
    for key, value in wanted.items():
        if mine.get(key) != value:
            raise DitAttnError(
                f"{name} has another {key} ({outputs.to_json(mine.get(key))}) than the command "
                f"({outputs.to_json(value)}); give all machines the same model and release of dit-attn"
            )


def explained(answer: Callable[[Any], Any]) -> Callable[[Any, bool], Any]:
    """Return a worker's function of one that answers requests: what it raises becomes one line.

    It raises :class:`~dit_attn.pipelines.run.JobFailed`, or ``RunStopped`` where the other workers must stop too.
    """

    def work(content: Any, again: bool) -> Any:
        try:
            return answer(content)
        except (RunStopped, JobFailed):
            raise
        except Exception as error:
            raise JobFailed(*runner.explain_failure(error)) from error

    return work
