"""The work of ``dit-attn finetune``: load, draw examples, train, write the result and its page."""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dit_attn.api import check
from dit_attn.cli import load_pipeline, outputs, resolve_methods
from dit_attn.cli.commands.finetune import early, on_workers
from dit_attn.cli.commands.finetune.config import call_of, config_of, prompts_of
from dit_attn.cli.load_pipeline import LoadConfig
from dit_attn.cli.model_source import Source
from dit_attn.cli.options import Options
from dit_attn.cli.progress import progress_bar
from dit_attn.cli.workers import join_workers
from dit_attn.errors import DitAttnError
from dit_attn.eval.report import finetune_page
from dit_attn.pipelines.finetune.config import FinetuneConfig
from dit_attn.pipelines.finetune.examples import read_examples
from dit_attn.pipelines.finetune.loop import Finetune
from dit_attn.pipelines.finetune.teacher import record_examples
from dit_attn.pipelines.finetune.validation import ValidationByWorkers
from dit_attn.pipelines.run import Answers, JobFailed
from dit_attn.pipelines.worker_share import WorkerShare

TINY = {
    "train_steps": 3, "batch": 1, "runs": 2, "calls_per_run": 1, "steps": 2, "log_every": 1, "lr": 1e-4,
    "num_frames": 4, "height": 32, "width": 32,
}  # fmt: skip
"""Flags of ``--tiny`` where they are not given."""


def run(options: Options) -> int:
    """Do it. Returns 0, or 130 after Ctrl-C.

    Raises:
        DitAttnError: bad input, or a run that cannot go on.
    """
    if options.get("tiny"):
        options.values.update({name: value for name, value in TINY.items() if name not in options})
    load = LoadConfig.from_options(options)
    source = load.source
    if source.transformer is None:
        raise DitAttnError(f"{source.pipeline.__name__} of {source.name} has no diffusion transformer to tune")
    spec = early.method_spec(options)
    (method,) = resolve_methods.resolve([spec], source.transformer, options.get("preset"))
    config = config_of(options, method)
    folder = early.output_of(options)
    device, share = join_workers(load.device, "device" in options)
    load = replace(load, device=device)
    outputs.prepare_folder(folder)
    if options.get("threads"):
        torch.set_num_threads(options["threads"])
    pipe = load_pipeline.load_pipeline(load)
    check(pipe, config.method_at(0))  # before the teacher draws examples
    try:
        with on_workers.answering(options, load, config, folder, call_of(options, source)) as answers:
            examples = _examples(options, source, pipe, config, folder, share, answers)
            validate = None if answers is None else ValidationByWorkers(answers, folder)
            job = Finetune(pipe, config, examples, validate, fsdp=bool(options.get("fsdp")))
            return _train(job, source, options, folder)
    except JobFailed as error:
        print(f"dit-attn: workers failed: {error}; what is done is in {folder}", file=sys.stderr)
        return 1


def _train(job: Finetune, source: Source, options: Options, folder: Path) -> int:
    """Train, and write the result; returns 0, or 130 after Ctrl-C."""
    config = job.config
    first = job.accelerator.is_main_process
    if options.get("resume"):
        job.restore(folder)
    try:
        with progress_bar(config.steps, "finetune", "step") as bar:
            bar.update(job.step)

            def on_step(step: int, loss: float) -> None:
                bar.update()
                bar.set_postfix(loss=f"{loss:.4g}", refresh=False)

            job.fit(folder, on_step)
    except KeyboardInterrupt:
        words = [*(word for word in options.argv if word != "--resume"), "--resume"]
        print(f"stopped at step {job.step} of {config.steps}; continue: dit-attn {shlex.join(words)}", file=sys.stderr)
        return 130
    job.gather()
    if first:
        _finish(job, source, options, folder)
    job.accelerator.wait_for_everyone()
    return 0


def _examples(
    options: Options, source: Source, pipe: Any, config: FinetuneConfig, folder: Path, share: WorkerShare,
    answers: Answers | None,
) -> list[Path]:  # fmt: skip
    """The files of the examples: those of ``--data``, or of runs of the dense model in the folder of the run."""
    if options.get("data"):
        return read_examples(Path(options["data"]).expanduser())
    prompts = prompts_of(options, source)
    with progress_bar(len(prompts), "draw examples", "run") as bar:
        return record_examples(
            pipe, prompts, folder / "data", calls_per_run=options.get("calls_per_run", 4), clean=config.loss == "flow",
            seed=config.seed, call=call_of(options, source), share=share, answers=answers,
            on_progress=lambda done, total: bar.update(),
        )  # fmt: skip


def _finish(job: Finetune, source: Source, options: Options, folder: Path) -> None:
    """Write the tuned parts, a pipeline with them, and the page; say where they are."""
    written = job.export(folder, weights=job.config.stage == "lora")
    if job.config.stage == "full":
        written.append(folder / "pipeline")
        _save_pipeline(job, source, written[-1])
    command = f"dit-attn {shlex.join(options.argv)}"
    about = f"stage {job.config.stage}, loss {job.config.loss}, {job.step} steps of {job.config.batch} examples"
    facts = [("method", repr(job.method)), ("examples", f"{len(job.training)} and {len(job.held_out)} held out")]
    title = f"{source.name}: fine-tuned with {job.method.slug}"
    outputs.write_json({"command": command, "method": job.method.to_dict(), "log": job.log}, folder / "log.json")
    outputs.write_text(finetune_page.page(title, about, job.log, command, facts), folder / "finetune.html")
    print(finetune_page.verdict(job.log))
    print(f"written: {', '.join(str(place) for place in written)}, {folder / 'finetune.html'}")


def _save_pipeline(job: Finetune, source: Source, folder: Path) -> None:
    """Write a pipeline with the tuned transformer, without the method."""
    from dit_attn.api import disable

    disable(job.model)
    job.pipe.save_pretrained(folder)
    training = Path(source.path) / "training.json"
    if source.kind == "embedded" and training.is_file():
        outputs.write_text(training.read_text(), folder / "training.json")
