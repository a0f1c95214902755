"""``dit-attn inspect``: measure what attention does in one run, by layer, head and step, as numbers and a page."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_attn.cli import options as flags
from dit_attn.cli import parser as parsers
from dit_attn.cli.early_check import check_early
from dit_attn.cli.progress import on_terminal
from dit_attn.cli.table import Table, fields, show
from dit_attn.errors import DitAttnError, RunStopped, reason

if TYPE_CHECKING:
    from dit_attn.cli.jobs import Job
    from dit_attn.cli.load_pipeline import LoadConfig
    from dit_attn.cli.run_record import Run
    from dit_attn.pipelines.inspect.inspection import Inspection
    from dit_attn.processors.methods.base import Method

PAGE = "inspect.html"
_OWN = (
    flags.Flag("rows", "query rows measured in every attention call", int, "64", low=1, high=4096),
    flags.Flag("block", "tokens per block", int, "64", low=1, high=4096),
    flags.Flag("rows-seed", "seed of the choice of rows", int, "0", low=0, high=flags.MAX_SEED - 2**32),
    flags.Flag("overhead", "also make the item without measuring, to compare time and result", "on-or-off", "on"),
)
GROUPS = {
    "model": (*flags.MODEL, *flags.WEIGHTS),
    "methods": flags.PRESET,
    "prompts": flags.without(flags.PROMPT, "prompts"),
    "measurements": _OWN,
    "size": flags.SIZE,
    "sampling": flags.without(flags.SAMPLING, "num-images-per-prompt"),
    "output": flags.without(flags.OUTPUT, "contact-sheet"),
    "run": flags.without(flags.RUN, "compile", "resume"),
}
_EXAMPLES = """examples:
  dit-attn inspect --model tiny-video \\
      --prompt "a large purple circle moving left fast on black"
  dit-attn inspect --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --prompt "a cat" \\
      --rows 32 --no-overhead --method block-sparse:density=0.25 \\
      --output outputs/wan-inspect
"""


@dataclass(frozen=True)
class InspectConfig:
    """One command, checked; no weights are loaded.

    Attributes:
        load: the pipeline.
        methods: enabled on it together.
        job: the one item.
        folder: of the files.
        argv: the command line, for the records.
        fps: frames per second of a video; ``None``: those of the model.
        rows: query rows measured in every attention call.
        block: tokens per block.
        rows_seed: of the choice of rows.
        overhead: also run without measuring.
        dry_run, json: print the plan and stop; print JSON.
    """

    load: LoadConfig
    methods: tuple[Method, ...]
    job: Job
    folder: Path
    argv: tuple[str, ...]
    fps: int | None = None
    rows: int = 64
    block: int = 64
    rows_seed: int = 0
    overhead: bool = True
    dry_run: bool = False
    json: bool = False

    @classmethod
    def from_options(cls, options: flags.Options) -> InspectConfig:
        """Check the flags.

        Raises:
            DitAttnError: bad input.
        """
        from dit_attn.cli import method_options, outputs, resolve_methods
        from dit_attn.cli.check_run import check_run
        from dit_attn.cli.load_pipeline import LoadConfig

        specs = method_options.method_specs(options)
        job = only_job(options)  # before torch is imported: what is wrong is reported at once
        load = LoadConfig.from_options(options, show_progress=on_terminal(), modular=True)
        source = load.source
        if source.transformer is None:
            raise DitAttnError(
                f"{source.pipeline.__name__} of {source.name} has no diffusion transformer, so there is nothing to "
                "inspect"
            )
        methods = resolve_methods.resolve(specs, source.transformer, options.get("preset"))
        job = replace(job, call={**source.defaults, **job.call})
        check_run(source, [job], methods)
        name = "-".join(["inspect", Path(source.path).name or "model", *(method.slug for method in methods)])
        folder = outputs.folder_of(options.get("output"), Path("outputs") / name)
        rest = options.pick("fps", "rows", "block", "rows_seed", "overhead", "dry_run", "json")
        return cls(load, methods, job, folder, options.argv, **rest)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``inspect``."""
    parsers.describe(
        parser,
        "inspect --model NAME --prompt TEXT [--method NAME] [options]",
        "Make one item while sampled query rows of every attention call are measured, and write "
        f"inspect.safetensors, inspect.json and {PAGE}. Measuring does not change the item.",
        _EXAMPLES,
    )
    parsers.add_groups(parser, GROUPS, parsers.TOGETHER)


def run(args: argparse.Namespace) -> int:
    """Check everything, load, run, write. Returns 0, 1 when the item failed, 130 after Ctrl-C.

    Raises:
        DitAttnError: bad input, before anything is loaded where that can be known.
    """
    from dit_attn.cli import jobs as job_files
    from dit_attn.cli import load_pipeline, outputs, run_record

    options = flags.merge(args, GROUPS)
    check_early(options, together=True)
    config = InspectConfig.from_options(options)
    live = run_record.new_run(config.load, config.methods, config.folder, config.argv, config.fps)
    if config.dry_run:
        return _print_plan(live, config)
    outputs.prepare_folder(config.folder)
    live.pipe = load_pipeline.load_pipeline(config.load.for_jobs([config.job]), bar=True)
    job_files.check_inputs([config.job], live.pipe)
    return _make(live, config)


def only_job(options: flags.Options) -> Job:
    """Make the one item of the command, without the arguments that the model needs.

    Raises:
        DitAttnError: no prompt, or several.
    """
    from dit_attn.cli import jobs as job_files

    if len(options.get("prompt", [])) > 1:
        raise DitAttnError("inspect looks at one run; give one --prompt TEXT")
    job = job_files.make_jobs(options.values, {})[0]
    job_files.check_images(job)
    return job


def _make(live: Run, config: InspectConfig) -> int:
    try:
        found = _inspected(live, config)
    except KeyboardInterrupt:
        print("dit-attn: interrupted; nothing was written", file=sys.stderr)
        return 130
    except (DitAttnError, RunStopped):
        raise
    except (RuntimeError, ValueError, TypeError, NotImplementedError, AttributeError) as error:
        if "--debug" in sys.argv:
            raise
        print(f"dit-attn: the item failed: {type(error).__name__}: {reason(error)}", file=sys.stderr)
        return 1
    if config.json:
        print(json.dumps({"folder": str(config.folder), **found.meta, "means": means(found)}, indent=1, default=str))
    else:
        _show(found, config.folder)
    return 0


def _inspected(live: Run, config: InspectConfig) -> Inspection:
    """Run with the methods enabled, measure, and write the item, the files and the page."""
    from dit_attn.cli import outputs, run_record, runner
    from dit_attn.eval.report.inspect_page import page
    from dit_attn.pipelines.inspect.collector import Collector
    from dit_attn.pipelines.inspect.inspection import inspect_run, layer_namer

    job = config.job
    collector = Collector(config.rows, config.block, config.rows_seed, layer_namer(live.pipe))
    made: list[tuple[outputs.Media, float]] = []

    def make() -> outputs.Media:
        made.append(runner.call_pipeline(live.pipe, job))
        return made[-1][0]

    with run_record.methods_enabled(live):
        if config.overhead and "num_inference_steps" in job.call:  # the first call of a process pays for set-up
            runner.call_pipeline(live.pipe, replace(job, call={**job.call, "num_inference_steps": 1}))
        found = inspect_run(live.pipe, make, collector, overhead=config.overhead)
        item = runner.save_item(live, job, *made[-1])
    found.meta |= _facts(live, job, str(item.file))
    try:
        found.save(config.folder)
    except OSError as error:
        raise DitAttnError(f"cannot write to --output {config.folder} ({error.strerror}); choose another") from error
    outputs.write_text(page(found.meta, found.tensors, config.folder), config.folder / PAGE)
    return found


def _facts(live: Run, job: Job, file: str) -> dict[str, Any]:
    """What ran, for ``inspect.json``."""
    from dit_attn.models.evaluate import current_commit
    from dit_attn.models.export import environment

    return {
        **live.setup,
        "prompt": job.prompt,
        "noise_seed": job.seed,
        "call": job.call,
        "file": Path(file).name,
        **live.facts,
        "environment": environment(),
        "commit": current_commit(),
    }


def means(found: Inspection) -> dict[str, float]:
    """Return the mean of every statistic."""
    return {name: float(f"{float(tensor.nanmean()):.6g}") for name, tensor in found.tensors.items()}


def _show(found: Inspection, folder: Path) -> None:
    """Print the means of every statistic, the density to set, the cost of measuring, and the files."""
    from dit_attn.eval.attention_stats import describe, ordered
    from dit_attn.eval.report.density_advice import density_advice
    from dit_attn.eval.report.inspect_page import overhead
    from dit_attn.pipelines.inspect.inspection import META, TENSORS

    branches: list[str] = found.meta["axes"]["branch"]
    rows = []
    for name in ordered(found.tensors):
        about, tensor = describe(name), found.tensors[name]
        each = [f"{float(tensor[i].nanmean()):.3g}" for i in range(len(branches))]
        rows.append((about.title, *each, about.unit))
    statistics = Table(("statistic", *(f">{name}" for name in branches), "unit"), rows, folded=("statistic", "unit"))
    files = fields({"page": folder / PAGE, "tensors": folder / TENSORS, "meaning": folder / META})
    advice = density_advice(found.meta, found.tensors)
    words = [f"{advice.sentence} {advice.detail}", ""] if advice else []
    show(statistics, "", *words, overhead(found.meta["timing"]), "", files)


def _print_plan(live: Run, config: InspectConfig) -> int:
    from dit_attn.cli import run_record

    job, runs = config.job, 2 if config.overhead else 1
    if config.json:
        plan = {
            "folder": str(live.folder),
            **live.setup,
            "item": {"prompt": job.prompt, "seed": job.seed, "call": job.call},
            "rows": config.rows,
            "block": config.block,
            "runs": runs,
            "command": live.facts["command"],
        }
        print(json.dumps(plan, indent=1, default=str))
        return 0
    lines = {
        **run_record.describe_setup(live),
        "item": f"{job.prompt!r}, seed {job.seed}, {json.dumps(job.call, default=str)}",
        "rows": f"{config.rows} of every attention call, blocks of {config.block} tokens",
        "runs": "2 (plain, then measured)" if config.overhead else "1 (measured)",
    }
    show(fields(lines))
    return 0
