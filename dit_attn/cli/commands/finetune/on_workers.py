"""Workers of a fine-tuning: runs of the teacher and held-out examples are theirs; the training stays here."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from dit_attn.cli import engines, load_pipeline, run_record, worker_setup
from dit_attn.cli.commands.finetune.config import config_of
from dit_attn.cli.load_pipeline import LoadConfig
from dit_attn.cli.options import Options
from dit_attn.pipelines.finetune.config import FinetuneConfig
from dit_attn.pipelines.finetune.teacher import TeacherRuns
from dit_attn.pipelines.finetune.validation import ValidationRequests
from dit_attn.pipelines.run import Answers

_OF_THE_TRAINING = ("stage", "loss", "batch", "rank", "gradient_checkpointing", "seed", "mixed_precision", "densities",
                    "train_steps")  # fmt: skip


def answering(
    options: Options, load: LoadConfig, config: FinetuneConfig, folder: Path, call: dict[str, Any]
) -> AbstractContextManager[Answers | None]:
    """Return what does the requests of a fine-tuning on workers, as a context manager; ``None`` for this process.

    Args:
        options: the flags.
        load: the pipeline.
        config: of the training.
        folder: of the run.
        call: arguments of the teacher's calls.
    """
    engine, _ = engines.from_options(options)
    if engine is None:
        return nullcontext()
    run = run_record.new_run(load, (config.method,), folder, options.argv)
    training = options.pick(*_OF_THE_TRAINING)
    recipe = worker_setup.recipe_of(f"{__name__}:make_worker", options, run, training=training, call=call)
    return engine.answering(recipe, folder, load.device)


def make_worker(settings: dict[str, Any], name: str) -> Callable[[Any, bool], Any]:
    """Load the pipeline in a worker; return the function that makes a run of the teacher, or measures an example.

    Args:
        settings: those of :func:`answering`, and the mark of the folder.
        name: of the worker, for messages.

    Raises:
        DitAttnError: no such model here, another one, or another folder.
    """
    run, load = worker_setup.worker_run(settings, name)
    config = config_of(Options(settings["training"]), run.methods[0])
    pipe = load_pipeline.load_pipeline(load)
    teacher = TeacherRuns(pipe, config.loss == "flow", settings["call"])
    validation = ValidationRequests(pipe, config)

    def answer(request: dict[str, Any]) -> Any:
        return validation(request) if "example" in request else teacher(request)

    return worker_setup.explained(answer)
