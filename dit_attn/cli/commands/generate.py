"""``dit-attn generate``: images and videos from prompts, with or without methods on the pipeline."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_attn.cli import high_resolution
from dit_attn.cli import options as flags
from dit_attn.cli import parser as parsers
from dit_attn.cli.early_check import check_early
from dit_attn.cli.output_address import check_output
from dit_attn.cli.progress import on_terminal
from dit_attn.cli.table import Table, fields, show
from dit_attn.errors import DitAttnError

if TYPE_CHECKING:
    from dit_attn.cli.jobs import Job
    from dit_attn.cli.load_pipeline import LoadConfig
    from dit_attn.cli.model_source import Source
    from dit_attn.cli.run_record import Run
    from dit_attn.pipelines.run import Shard
    from dit_attn.processors.methods.base import Method
    from dit_attn.remote import Place

GROUPS = {
    "model": (*flags.MODEL, *flags.WEIGHTS),
    "methods": (*flags.PRESET, *flags.SUBJECTS),
    "prompts": flags.PROMPT,
    "size": flags.SIZE,
    "sampling": flags.SAMPLING,
    "high resolution": high_resolution.FLAGS,
    "output": flags.ADDRESS_OUTPUT,
    "run": flags.RUN,
    "workers": flags.ENGINE,
}
_EXAMPLES = """examples:
  dit-attn generate --model tiny-image \\
      --prompt "a large red circle at the left on white"
  dit-attn generate --model tiny-video --method re-ttention:mask=selected \\
      --prompt "a large purple circle moving left fast on black"
  dit-attn generate --model tiny-joint --subjects subjects.json \\
      --prompt "a large red circle and a large blue cross on white"
  dit-attn generate --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers \\
      --prompts prompts.jsonl --method re-ttention --resume
  dit-attn generate --model Wan-AI/Wan2.1-T2V-14B-Diffusers \\
      --height 2160 --width 3840 --high-resolution --prompt "a cat"
"""


@dataclass(frozen=True)
class GenerateConfig:
    """One command, checked; no weights are loaded.

    Attributes:
        load: the pipeline.
        methods: enabled on it together.
        jobs: the items.
        folder: of the files, a path or an address.
        argv: the command line, for the records.
        fps: frames per second of videos; ``None``: those of the model.
        contact_sheet: make ``sheet.png``.
        resume: skip items that are there already.
        dry_run, json: print the plan and stop; print JSON.
        device_given: whether ``--device`` was; else every process takes a GPU of its own.
        stages: every item is made in two stages.
        shard: the part of the items that is made; ``None``: all.
    """

    load: LoadConfig
    methods: tuple[Method, ...]
    jobs: tuple[Job, ...]
    folder: Place
    argv: tuple[str, ...]
    contact_sheet: bool
    fps: int | None = None
    resume: bool = False
    dry_run: bool = False
    json: bool = False
    device_given: bool = False
    stages: high_resolution.TwoStages | None = None
    shard: Shard | None = None

    @classmethod
    def from_options(cls, options: flags.Options, edits: bool = False) -> GenerateConfig:
        """Check the flags.

        Args:
            options: the flags.
            edits: every item must have an input image.

        Raises:
            DitAttnError: bad input.
        """
        from dit_attn.cli import edit_inputs, method_options, outputs
        from dit_attn.cli import jobs as job_files
        from dit_attn.cli.check_run import check_run
        from dit_attn.cli.load_pipeline import LoadConfig
        from dit_attn.cli.subjects import check_methods, pieces_of, with_subjects

        specs = method_options.method_specs(options)
        jobs = job_files.make_jobs(options.values, {})  # before torch is imported: what is wrong is reported at once
        for job in jobs:
            job_files.check_images(job)
        specs = with_subjects(options, specs, jobs)
        if edits:
            edit_inputs.check_images_given(jobs)
        load = LoadConfig.from_options(options, show_progress=on_terminal(), modular=True)
        if edits:
            edit_inputs.check_edits(load.source.pipeline, load.source.name)
        methods = _methods(specs, load.source, options.get("preset"))
        stages = high_resolution.TwoStages.from_options(options, load, jobs, methods)
        methods = methods if stages is None else stages.methods
        jobs = [replace(job, call={**load.source.defaults, **job.call}) for job in jobs]
        ranges = not all(isinstance(piece, str) for piece in pieces_of(methods))
        jobs = [edit_inputs.for_pipeline(job, load.source.pipeline, ranges) for job in jobs]
        check_run(load.source, jobs, methods)
        check_methods(methods, jobs, load.source)
        folder = outputs.place_given(options.get("output"), _default_folder(load.source, methods))
        sheet = options.get("contact_sheet", len(jobs) > 1)
        rest = {"device_given": "device" in options, **options.pick("fps", "resume", "dry_run", "json")}
        return cls(load, methods, tuple(jobs), folder, options.argv, sheet, stages=stages, **rest)

    def new_run(self) -> Run:
        """Return a run of it without results."""
        from dit_attn.cli import run_record

        return run_record.new_run(self.load, self.methods, self.folder, self.argv, self.fps, stages=self.stages)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``generate``."""
    parsers.describe(
        parser,
        "generate --model NAME --prompt TEXT [--method NAME] [options]",
        "Make images or videos from prompts with a stock diffusers pipeline.",
        _EXAMPLES,
    )
    parsers.add_groups(parser, GROUPS, parsers.TOGETHER)


def run(args: argparse.Namespace) -> int:
    """Check everything, load once, make every item. Returns 0, 1 when items failed, 130 after Ctrl-C.

    Several processes, of ``torchrun`` or ``accelerate launch``, share the items; the first one writes the report.

    Raises:
        DitAttnError: bad input, before anything is loaded where that can be known.
    """
    return run_options(flags.merge(args, GROUPS))


def run_options(options: flags.Options, edits: bool = False) -> int:
    """Do what the flags say.

    Args:
        options: the flags.
        edits: every item must have an input image, which it is made from.

    Raises:
        DitAttnError: as for :func:`run`.
    """
    from dit_attn.cli import engines, item_report, item_worker, outputs, run_record, runner, workers
    from dit_attn.cli import jobs as job_files

    high_resolution.check_flags(options)
    engine, shard = engines.from_options(options)
    check_early(options, together=True)
    check_output(options.get("output"))
    config = replace(GenerateConfig.from_options(options, edits), shard=shard)
    if config.dry_run:
        live = config.new_run()
        return _print_plan(live, config) if workers.process_rank()[0] == 0 else 0
    device, worker = workers.join_workers(config.load.device, config.device_given)
    config = replace(config, load=replace(config.load.for_jobs(config.jobs), device=device))
    live = config.new_run()
    outputs.prepare_folder(config.folder)
    part = list(config.jobs) if shard is None else shard.part(config.jobs)
    items = runner.Items(worker.part(part), len(config.jobs), config.contact_sheet and shard is None)
    if config.resume:
        items.done = runner.find_finished(items.jobs, config.folder, live.setup)
    if engine is None and items.todo:
        run_record.load_run(live, config.load, bar=True)
        job_files.check_inputs(items.jobs, live.pipe)
    started, on_item = time.perf_counter(), _silent if config.json else print
    try:
        if engine is None:
            runner.run_jobs(live, items, on_item)
        else:
            recipe = item_worker.recipe_of(options, live, config.load)
            item_worker.run_on_engine(live, items, on_item, engine, recipe, device)
    except KeyboardInterrupt:
        saved = sum(result.status != "failed" for result in live.results)
        print(
            f"dit-attn: interrupted; {saved} of {len(items.jobs)} items are in {live.folder}; "
            "run the same command with --resume to go on",
            file=sys.stderr,
        )
        return 130
    made_here = engine is None and any(item.status == "done" for item in live.results)
    live.results = sorted(worker.gather(live.results), key=lambda result: result.index)
    live.tiles = dict(sorted(worker.gather(list(live.tiles.items()))))
    if worker.rank == 0:
        report = run_record.report(live, time.perf_counter() - started)
        if shard is not None:
            report["shard"] = run_record.describe_shard(shard, [job.digest(live.setup) for job in config.jobs])
        summary = _summary(live) if made_here and not config.json else None
        item_report.write(report, live.folder, live.tiles, config.argv, config.json, summary, shard)
    return 1 if any(item.status == "failed" for item in live.results) else 0


def _summary(live: Run) -> Any:
    """What the methods did, for printing; ``None`` without methods."""
    import dit_attn

    if not live.methods:
        return None
    return dit_attn.summary(live.pipe) if live.stages is None else live.last_summary


def _methods(specs: list[Any], source: Source, preset: str | None) -> tuple[Method, ...]:
    from dit_attn.cli.resolve_methods import resolve

    if specs and source.transformer is None:
        raise DitAttnError(
            f"{source.pipeline.__name__} of {source.name} has no diffusion transformer, which methods need; "
            "leave out --method"
        )
    return resolve(specs, source.transformer, preset)


def _default_folder(source: Source, methods: tuple[Method, ...]) -> Path:
    """``outputs/MODEL-METHOD``: the same command finds its own outputs again."""
    parts = [Path(source.path).name or "model", *([method.slug for method in methods] or ["dense"])]
    return Path("outputs") / "-".join(parts)


def _print_plan(live: Run, config: GenerateConfig) -> int:
    from dit_attn.cli import outputs, run_record

    items: list[dict[str, Any]] = [
        {"name": job.stem, "prompt": job.prompt, "seed": job.seed, "call": job.call} for job in config.jobs
    ]
    if config.json:
        print(json.dumps({"folder": str(live.folder), **live.setup, **live.facts, "items": items}, indent=1))
        return 0
    planned = [(item["name"], repr(item["prompt"]), outputs.to_json(item["call"])) for item in items]
    about = fields({**run_record.describe_setup(live), "items": len(items)})
    show(about, "", Table(("item", "prompt", "call"), planned, folded=("prompt",)))
    return 0


def _silent(line: str) -> None:
    """Print nothing: ``--json`` owns standard output."""
