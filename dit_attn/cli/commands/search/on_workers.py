"""A search on workers: candidates are scored where the pipeline is, and images of the page come as files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np

from dit_attn import files
from dit_attn.cli import load_pipeline, worker_setup
from dit_attn.cli.commands.search.config import HeadSearchConfig, scorer_options
from dit_attn.cli.run_record import Run
from dit_attn.errors import RunStopped
from dit_attn.pipelines.head_search import HeadHunter, Pair, SearchConfig, make_objective
from dit_attn.pipelines.head_search.evaluation import Arm, parse_arm
from dit_attn.pipelines.run import Answers

Images = list[np.ndarray | None]


def answering(config: HeadSearchConfig, live: Run) -> AbstractContextManager[Answers | None]:
    """Return what does the requests of a search on workers, as a context manager; ``None`` for this process."""
    if config.engine is None:
        return nullcontext()
    settings = {
        "search": asdict(config.search),
        "objective": config.objective,
        "scorer": config.scorer,
        "pairs": [asdict(pair) for pair in config.pairs],
        "call": config.call,
    }
    recipe = worker_setup.recipe_of(f"{__name__}:make_worker", config.options, live, **settings)
    return config.engine.answering(recipe, config.folder, config.load.device)


def make_worker(settings: dict[str, Any], name: str) -> Callable[[Any, bool], Any]:
    """Load the pipeline and the objective in a worker; return the function that answers one request.

    Args:
        settings: those of :func:`answering`, and the mark of the folder.
        name: of the worker, for messages.

    Raises:
        DitAttnError: no such model here, another one, or another folder.
    """
    run, load = worker_setup.worker_run(settings, name)
    objective = make_objective(settings["objective"], scorer_options(settings["scorer"], load.device))
    pairs = [Pair(**pair) for pair in settings["pairs"]]
    pipe = load_pipeline.load_pipeline(load)
    hunter = HeadHunter(pipe, pairs, objective, SearchConfig(**settings["search"]), call=settings["call"])

    def answer(request: dict[str, Any]) -> Any:
        if "file" not in request:
            return hunter.answer(request)
        made = hunter.make(parse_arm(request["arm"]), [pairs[i] for i in request["pairs"]])
        _write_images(run.folder / request["file"], made)
        return None

    return worker_setup.explained(answer)


def pictures(arms: Sequence[Arm], where: Sequence[int], folder: Path, answers: Answers) -> list[Images]:
    """Have the images of arms made without scoring them.

    Args:
        arms: heads with their strengths.
        where: positions of the pairs.
        folder: where workers leave the images, for as long as this takes.
        answers: does the requests.

    Returns:
        By arm and pair uint8 (F, H, W, 3); ``None`` where the result is not finite.
    """
    names = [f"{files.TEMPORARY}{uuid4().hex}.npz" for _ in arms]
    requests = [
        {"arm": [list(head) for head in arm], "pairs": list(where), "file": name} for arm, name in zip(arms, names)
    ]
    try:
        for _ in answers(requests):
            pass
        return [_read_images(folder / name, len(where)) for name in names]
    finally:
        for name in names:
            with suppress(OSError):
                (folder / name).unlink(missing_ok=True)


def _write_images(path: Path, images: Images) -> None:
    finite = {str(i): image for i, image in enumerate(images) if image is not None}
    remedy = "free some space and go on with --resume"
    with files.report_os_error(f"write {path}", remedy, RunStopped), files.atomic_path(path) as temporary:
        np.savez(temporary, **finite)  # type: ignore[arg-type]


def _read_images(path: Path, count: int) -> Images:
    with np.load(path, allow_pickle=False) as found:
        return [found.get(str(i)) for i in range(count)]
