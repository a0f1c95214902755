"""The work behind ``dit-attn search``: processes, the search itself, the files, the table."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dit_attn.cli import load_pipeline, outputs, run_record
from dit_attn.cli.commands.search import on_workers
from dit_attn.cli.commands.search.config import HeadSearchConfig, scorer_options
from dit_attn.cli.progress import progress_bar
from dit_attn.cli.table import Table, fields, show
from dit_attn.cli.workers import join_workers
from dit_attn.eval.report.digits import write_figure
from dit_attn.eval.report.search_page import page
from dit_attn.eval.report.search_verdict import search_verdict
from dit_attn.pipelines.head_search import HeadHunter, HeadSet, Objective, make_objective
from dit_attn.pipelines.head_search.evaluation import Arm
from dit_attn.pipelines.head_search.head_set import FILE_NAME
from dit_attn.pipelines.head_search.strategies import Round, not_differentiable
from dit_attn.pipelines.measurement_log import MeasurementLog
from dit_attn.pipelines.run import Answers
from dit_attn.pipelines.worker_share import WorkerShare

PAGE = "search.html"
LOG = "evaluations"
SHOWN = 4  # pairs in the grid of the page, at most


def run_all(config: HeadSearchConfig) -> HeadSet | None:
    """Search, and write ``heads.json`` and the page. ``None`` in processes other than the first.

    Raises:
        DitAttnError: the folder cannot be written, weights that cannot be loaded, an objective that cannot score.
        KeyboardInterrupt: every score is saved.
    """
    device, worker = join_workers(config.load.device, config.device_given)
    config = replace(config, load=replace(config.load, device=device))
    outputs.prepare_folder(config.folder)
    live = run_record.new_run(config.load, (), config.folder, config.argv)
    objective = make_objective(config.objective, scorer_options(config.scorer, device_of(config)))
    if config.search.strategy == "gradient" and objective.pixels is None:
        raise not_differentiable(objective.name)
    _check_prompts(config, objective)
    log = open_log(config, live, worker)
    source = config.load.source
    pipe = load_pipeline.load_pipeline(config.load) if config.engine is None else source.without_weights
    started = time.perf_counter()
    shown = worker.rank == 0 and not config.json
    with Progress(config.search.rounds, shown) as progress, on_workers.answering(config, live) as answers:
        hunter = HeadHunter(
            pipe, config.pairs, objective, config.search, call=config.call, model=source.name, log=log,
            worker=worker, on_progress=progress.on_progress, on_round=progress.on_round, answers=answers,
        )  # fmt: skip
        found = hunter.search()
        pictures = grid(hunter, found, config.folder, answers) if worker.rank == 0 else []
    if worker.rank:
        return None
    found.search.update(_facts(config, live, time.perf_counter() - started, worker))
    outputs.write_json(found.to_dict(), config.folder / FILE_NAME)
    outputs.write_text(page(found.to_dict(), pictures, live.fps), config.folder / PAGE)
    return found


def device_of(config: HeadSearchConfig) -> Any:
    """Return where this process scores: workers have the GPUs for themselves."""
    return config.load.device if config.engine is None else "cpu"


def _check_prompts(config: HeadSearchConfig, objective: Objective) -> None:
    """Let the objective score one gray image of every prompt, so that prompts it cannot score are refused at once."""
    if objective.name not in ("verifier", "verifier-whole", "fid-world", "drawn-world"):
        return
    prompts = [pair.prompt for pair in config.pairs]
    gray = np.full((8 if "num_frames" in config.call else 1, 32, 32, 3), 128, dtype=np.uint8)
    objective.score([gray] * len(prompts), prompts)


def open_log(config: HeadSearchConfig, live: run_record.Run, worker: WorkerShare) -> MeasurementLog:
    """Open the scores of earlier runs: every process writes a file of its own and knows the scores of all of them."""
    search, resume = config.search, config.resume
    guidance = {name: getattr(search, name) for name in ("scale", "target", "joint", "guidance_scale")}
    setup = {
        **live.setup,
        "objective": config.objective,
        "scorer": {**guidance, **config.scorer},
        "pairs": [[pair.prompt, pair.seed] for pair in config.pairs],
        "call": config.call,
    }
    mine = config.folder / (f"{LOG}.jsonl" if worker.rank == 0 else f"{LOG}-{worker.rank}.jsonl")
    log = MeasurementLog(mine, setup, resume)
    others = []
    if worker.rank == 0:
        for file in sorted(config.folder.glob(f"{LOG}-*.jsonl")):
            if int(file.stem.rpartition("-")[2]) >= worker.size:  # of a run with more processes
                if resume:
                    others += list(MeasurementLog(file, setup, True).rows.items())
                else:
                    file.unlink()
    for key, value in worker.gather([*log.rows.items(), *others]):
        log.rows.setdefault(key, value)
    return log


class Progress:
    """A bar over the images of the evaluation in progress, and a line per round.

    Args:
        rounds: number of rounds.
        shown: whether this process prints.
    """

    def __init__(self, rounds: int, shown: bool) -> None:
        self.rounds, self.shown = rounds, shown
        self._bar: Any = None
        self._last = 0

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self._close()

    def on_progress(self, done: int, total: int) -> None:
        """Show that so many images of the evaluation are done."""
        if self._bar is None:
            self._bar, self._last = progress_bar(total, "search", "image", self.shown, least=1), 0
        self._bar.update(done - self._last)
        self._last = done
        if done >= total:
            self._close()

    def on_round(self, number: int, found: Round) -> None:
        """Print the heads of a round that is over."""
        self._close()
        if self.shown:
            heads = ", ".join(f"{layer}:{head} ({found.scores[layer, head]:.4g})" for layer, head in found.chosen)
            print(f"round {number + 1} of {self.rounds}: {heads}", file=sys.stderr)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._bar = None


def grid(hunter: HeadHunter, found: HeadSet, folder: Path, answers: Answers | None = None) -> list[dict[str, Any]]:
    """Make images of the first pairs (those held out where there are any): without guidance, and after every set.

    Args:
        hunter: of the search.
        found: its result.
        folder: of the files.
        answers: makes them; ``None``: the pipeline of the hunter does.
    """
    count, held = hunter.plan.pairs, hunter.config.held_out
    where = list(range(count, count + held) if held else range(count))[:SHOWN]
    pairs = [hunter.evaluator.pairs[i] for i in where]
    sets = found.checks["held_out" if held else "searched"]
    arms: dict[str, Arm] = {
        name: tuple((str(a), int(b), float(c)) for a, b, c in one["heads"]) for name, one in sets.items()
    }
    layer = found.search.get("best_layer", {}).get("name")
    names = [name for name in ("none", f"round {hunter.config.rounds}", "tuned", layer, "random 1") if name in arms]
    if answers is None:
        made = {name: hunter.make(arms[name], pairs) for name in names}
    else:
        made = dict(zip(names, on_workers.pictures([arms[name] for name in names], where, folder, answers)))
    return [
        {"prompt": pair.prompt, "seed": pair.seed, "images": {name: made[name][i] for name in names}}
        for i, pair in enumerate(pairs)
    ]


def _facts(config: HeadSearchConfig, live: run_record.Run, seconds: float, worker: WorkerShare) -> dict[str, Any]:
    """What ran, for the file."""
    from dit_attn.models.evaluate import current_commit
    from dit_attn.models.export import environment

    return {
        "seconds": round(seconds, 2),
        "processes": worker.size,
        **({} if config.engine is None else {"engine": str(config.engine)}),
        "setup": live.setup,
        "call": config.call,
        "environment": environment(),
        "commit": current_commit(),
        **live.facts,
    }


def show_result(found: HeadSet, folder: Path) -> None:
    """Print scores, the verdict, cost and files; the command to use the heads only where they are better for sure."""
    about, verdict = found.search, search_verdict(found.to_dict())
    parts: list[str | Table] = []
    for name, checks in found.checks.items():
        rows = [
            (label, _figure(one["score"]), "" if one["gain"] is None else _figure(one["gain"], "+"))
            for label, one in checks.items()
        ]
        parts += [Table(("", "score [95 %]", "gain [95 %]"), rows, f"{about['objective']} on {_on(name)}"), ""]
    if "best_layer" in about:
        best = about["best_layer"]
        parts += [
            f"heads over {best['name']}, best when searched: {_figure(lead, '+')} on {_on(name)}"
            for name, lead in best["lead"].items()
        ]
        parts.append("")
    total = sum(about["images"].values())
    cost = ", ".join(f"{count} {name}" for name, count in about["images"].items())
    heads = "; ".join(f"{layer}:{head}@{u:g}" for layer, head, u in found.heads)
    file = folder / FILE_NAME
    summary = {
        "heads": heads or "none: every strength was tuned to 0",
        "images": f"{total} ({cost}); {sum(about['passes'].values())} transformer passes",
        "file": file,
        "page": folder / PAGE,
    }
    if verdict.use:
        summary["use"] = (
            f"dit-attn generate --model {found.model} --method softpag --set heads={file} "
            f"--set scale={found.scale:g} --prompt ..."
        )
    show(*parts, f"Verdict: {verdict.chip}. {verdict.sentence} {verdict.advice}", "", fields(summary))


def _on(name: str) -> str:
    return f"{name.replace('_', ' ')} pairs"


def _figure(found: dict[str, Any] | None, sign: str = "") -> str:
    """A number with its interval."""
    if found is None:
        return "no finite score"
    value, spread = write_figure(found, sign)
    return f"{value} ({spread})" if spread else value
