"""``dit-attn inspect``: one run, watched: what its attention does, layer by head by step, as numbers and a page."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_attn.cli import options as flags
from dit_attn.errors import DitAttnError

if TYPE_CHECKING:
    from dit_attn.cli.jobs import Job
    from dit_attn.cli.model_source import Source
    from dit_attn.cli.runner import Run
    from dit_attn.pipelines.inspect.inspect import Inspection

PAGE = "inspect.html"
_OWN = (
    flags.Flag("rows", "query rows looked at in every attention call (default: 64)", int, low=1, high=4096),
    flags.Flag("block", "tokens per block (default: 64)", int, low=1, high=4096),
    flags.Flag("rows-seed", "seed of the choice of rows (default: 0)", int, low=0, high=flags.MAX_SEED - 2**32),
    flags.Flag("overhead", "also make the item without watching, for time and result (default: yes)", "on-or-off"),
)
_GROUPS = {
    "model": flags.MODEL,
    "prompt": flags.without(flags.PROMPT, "prompts"),
    "measurements": _OWN,
    "size": flags.SIZE,
    "sampling": flags.without(flags.SAMPLING, "num-images-per-prompt"),
    "machine": flags.without(flags.MACHINE, "compile"),
    "output": flags.without(flags.OUTPUT, "contact-sheet", "resume"),
}
_EXAMPLES = """examples:
  dit-attn inspect --model tiny-video --prompt "a large blue square moving right fast on white"
  dit-attn inspect --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --prompt "a cat" --rows 32 --no-overhead \\
      --method block-sparse --set density=0.25 --output outputs/wan-inspect
"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Register ``inspect`` and return its parser."""
    parser = subparsers.add_parser(
        "inspect",
        help="measure what attention does in a run, layer by head by step, and make a page of it",
        description="Make one item while sampled query rows of every attention call are measured, and write "
        f"inspect.safetensors, inspect.json and {PAGE}. The item is what it is without watching.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for title, group in _GROUPS.items():
        flags.add_flags(parser, title, group)
    flags.add_method_flags(parser)
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Check everything, load, run, write. Returns 0, 1 when the item failed, 130 after Ctrl-C.

    Raises:
        DitAttnError: bad input, before anything is loaded where that can be known.
    """
    from dit_attn.cli import jobs as job_files
    from dit_attn.cli import load_pipeline, method_options, model_source, outputs, runner
    from dit_attn.cli.commands import generate

    options, config = generate.merged_options(args)
    wanted = method_options.wanted_methods(getattr(args, "words", []), config)
    device = load_pipeline.pick_device(options.get("device", "auto"))
    load_pipeline.check_machine(options, device)
    load_pipeline.parse_loras(options.get("lora", []))
    load_pipeline.quiet(sys.stderr.isatty())
    model = model_source.describe(options["model"], options.get("revision"))
    if model.transformer is None:
        raise DitAttnError(
            f"{model.pipeline.__name__} of {model.name} has no diffusion transformer, so there is nothing to inspect"
        )
    chosen = method_options.resolve(wanted, model.transformer, options.get("preset"))
    job = only_job(options, model)
    job_files.check_calls([job], model.pipeline)
    dtype = load_pipeline.pick_dtype(options.get("dtype", "auto"), model, device)
    name = "-".join(["inspect", Path(model.path).name or "model", *(method.slug for method in chosen)])
    folder = Path(options.get("output") or Path("outputs") / name).expanduser()
    live = runner.new_run(None, model, chosen, options, dtype, device, folder, args.argv)
    if options.get("dry_run"):
        return _print_plan(live, job, options)
    outputs.prepare_folder(folder)
    live.pipe = load_pipeline.load_pipeline(model, options, device, dtype)
    job_files.check_inputs([job], live.pipe)
    return _make(live, job, options)


def only_job(options: dict[str, Any], model: Source) -> Job:
    """The one item of the command.

    Raises:
        DitAttnError: no prompt, or several.
    """
    from dit_attn.cli import jobs as job_files

    if "prompts" in options or len(options.get("prompt", [])) > 1:
        raise DitAttnError("inspect looks at one run; give one --prompt TEXT")
    return job_files.make_jobs({**options, "num_images_per_prompt": 1}, model.defaults)[0]


def _make(live: Run, job: Job, options: dict[str, Any]) -> int:
    from dit_attn.cli.options import reason
    from dit_attn.errors import RunStopped

    try:
        found = _watched(live, job, options)
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
    if options.get("json"):
        print(json.dumps({"folder": str(live.folder), **found.meta, "means": means(found)}, indent=1, default=str))
    else:
        print(table(found, live.folder))
    return 0


def _watched(live: Run, job: Job, options: dict[str, Any]) -> Inspection:
    """Run with the methods on, measure, and write the item, the files and the page."""
    from dit_attn.cli import outputs, runner
    from dit_attn.eval.report.inspect_page import page
    from dit_attn.pipelines.inspect import inspect

    seed, overhead = options.get("rows_seed", 0), options.get("overhead", True)
    names = inspect.namer(live.pipe)
    collector = inspect.Collector(options.get("rows", inspect.ROWS), options.get("block", inspect.BLOCK), seed, names)
    made: list[tuple[outputs.Media, float]] = []

    def make() -> outputs.Media:
        made.append(runner.call_pipeline(live.pipe, job))
        return made[-1][0]

    with _methods_on(live):
        if overhead and "num_inference_steps" in job.call:  # the first call of a process pays for set-up
            runner.call_pipeline(live.pipe, replace(job, call={**job.call, "num_inference_steps": 1}))
        found = inspect.watch(live.pipe, make, collector, overhead=overhead)
        item = runner.save_item(live, job, *made[-1])
    found.meta |= _facts(live, job, str(item.file))
    try:
        found.save(live.folder)
    except OSError as error:
        raise DitAttnError(f"cannot write to --output {live.folder} ({error.strerror}); choose another") from error
    outputs.write_text(page(found.meta, found.tensors), live.folder / PAGE)
    return found


def _methods_on(live: Run) -> AbstractContextManager[Any]:
    import dit_attn

    return dit_attn.enabled(live.pipe, *live.methods) if live.methods else nullcontext()


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
    """Mean of every statistic."""
    return {name: float(f"{float(tensor.nanmean()):.6g}") for name, tensor in found.tensors.items()}


def table(found: Inspection, folder: Path) -> str:
    """Means of every statistic, overhead and files as text."""
    from dit_attn.eval.attention_stats import describe, ordered
    from dit_attn.eval.report.inspect_page import overhead
    from dit_attn.pipelines.inspect.inspect import META, TENSORS

    branches: list[str] = found.meta["axes"]["branch"]
    per: Callable[[Any, int], str] = lambda tensor, i: f"{float(tensor[i].nanmean()):.3g}"  # noqa: E731
    rows = [("", *branches, "")]
    for name in ordered(found.tensors):
        about, tensor = describe(name), found.tensors[name]
        rows.append((about.title, *(per(tensor, i) for i in range(len(branches))), about.unit))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    files = {"page": PAGE, "tensors": TENSORS, "meaning": META}
    shown = "\n".join(f"{word:<9}{folder / name}" for word, name in files.items())
    return "\n".join([*lines, "", overhead(found.meta["timing"]), "", shown])


def _print_plan(live: Run, job: Job, options: dict[str, Any]) -> int:
    from dit_attn.pipelines.inspect.inspect import BLOCK, ROWS

    plan = {
        "folder": str(live.folder),
        **live.setup,
        "item": {"prompt": job.prompt, "seed": job.seed, "call": job.call},
        "rows": options.get("rows", ROWS),
        "block": options.get("block", BLOCK),
        "runs": 2 if options.get("overhead", True) else 1,
        "command": live.facts["command"],
    }
    if options.get("json"):
        print(json.dumps(plan, indent=1, default=str))
        return 0
    methods = "; ".join(json.dumps(method, default=str) for method in live.setup["methods"])
    lines = {
        "model": f"{live.setup['model']} ({live.setup['pipeline']}, {live.setup['dtype']}, {live.facts['device']})",
        "methods": methods or "none (stock attention)",
        "folder": plan["folder"],
        "item": f"{job.prompt!r}, seed {job.seed}, {json.dumps(job.call, default=str)}",
        "rows": f"{plan['rows']} of every attention call, blocks of {plan['block']} tokens",
        "runs": f"{plan['runs']}" + (" (plain, then watched)" if plan["runs"] == 2 else " (watched)"),
    }
    print("\n".join(f"{key:<10}{value}" for key, value in lines.items()))
    return 0
