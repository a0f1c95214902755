"""``dit-attn calibrate``: densities by layer and part of the run, from a few prompts and a budget, as one file."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_attn.cli import options as flags
from dit_attn.errors import DitAttnError, RunStopped

if TYPE_CHECKING:
    from dit_attn.cli.commands.calibrate.run import Setting
    from dit_attn.cli.jobs import Job
    from dit_attn.cli.model_source import Source
    from dit_attn.pipelines.calibrate.sensitivity import Plan

ITEMS = 4
APART = 1000  # between the seeds of training captions and of held-out ones
_OWN = (
    flags.Flag(
        "items", f"calibrate on so many prompts (default: all that are not checked on; captions: {ITEMS})", int, low=1
    ),
    flags.Flag("check", "compare with one density for all on the so many prompts after them (default: 0)", int, low=0),
    flags.Flag("held-out", "compare on so many held-out captions of the shapes world, for embedded models", int, low=1),
    flags.Flag("cost", "budget: largest executed share of the run's attention map, e.g. 0.3", float, low=0.0, high=1.0),
    flags.Flag("error", "budget: largest expected error of the final latents, relative, e.g. 0.05", float, low=0.0),
    flags.Flag("parts", "equal parts of the run with densities of their own (default: 10, at most the steps)", int,
               low=1),
    flags.Flag("every", "measure the layers' own errors at one step of N (default: one of every part)", int, low=1),
    flags.Flag("densities", "densities to measure, e.g. 0.5,0.25,0.125", metavar="X,X"),
)  # fmt: skip
_GROUPS = {
    "model": flags.MODEL,
    "prompts": flags.PROMPT,
    "calibration": _OWN,
    "size": flags.SIZE,
    "sampling": flags.without(flags.SAMPLING, "num-images-per-prompt"),
    "machine": flags.without(flags.MACHINE, "compile"),
    "output": (
        *flags.without(flags.OUTPUT, "contact-sheet", "fps", "resume"),
        flags.Flag("resume", "go on with the measurements that are already there", bool),
        flags.Flag("push-to-hub", "upload the result to this repository of the Hugging Face Hub", metavar="ORG/NAME"),
    ),
}
_EXAMPLES = """examples:
  dit-attn calibrate --model tiny-video --method rectified-spaattn --items 2 --held-out 12 --parts 5
  dit-attn calibrate --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --method rectified-spaattn --prompts prompts.txt \\
      --items 4 --check 8 --error 0.05 --output outputs/wan --resume
  dit-attn generate --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --prompt "a cat" \\
      --method outputs/wan/dit_attn_method.json
"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Register ``calibrate`` and return its parser."""
    parser = subparsers.add_parser(
        "calibrate",
        help="find densities by layer and part of the run from a few prompts and a budget",
        description="Measure what sparse attention does to the result, layer by layer and part by part of the run, "
        "choose densities for a budget of cost or of error, check them on other prompts, and write them as one file "
        "that enable() and --method take. Without a budget: the cost that the method has with one density for all.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for title, group in _GROUPS.items():
        flags.add_flags(parser, title, group)
    flags.add_method_flags(parser)
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Check everything, load, measure what is missing, write the file.

    Returns:
        0, 1 when a run failed, 130 after Ctrl-C.

    Raises:
        DitAttnError: bad input, before anything is loaded where that can be known.
    """
    setting = _setting(args)
    from dit_attn.cli.commands.calibrate import run as calibrate_run

    if setting.options.get("dry_run"):
        return _print_plan(setting)
    kept = f"what is measured is in {setting.folder}; run the same command with --resume to go on"
    try:
        record = calibrate_run.run_all(setting)
    except KeyboardInterrupt:
        print(f"dit-attn: interrupted; {kept}", file=sys.stderr)
        return 130
    except (DitAttnError, RunStopped):
        raise
    except (RuntimeError, ValueError, TypeError, NotImplementedError, AttributeError) as error:
        if "--debug" in sys.argv:
            raise
        print(f"dit-attn: a run failed: {type(error).__name__}: {flags.reason(error)}; {kept}", file=sys.stderr)
        return 1
    print(json.dumps(record, indent=1, default=str) if setting.options.get("json") else table(record))
    return 0


def _setting(args: argparse.Namespace) -> Setting:
    """Read and check the flags, without loading weights."""
    from dit_attn.cli import jobs as job_files
    from dit_attn.cli import load_pipeline, method_options, model_source, runner
    from dit_attn.cli.commands import generate
    from dit_attn.cli.commands.calibrate import run as calibrate_run

    own = [flag for group in ("calibration", "output") for flag in _GROUPS[group]]
    options, config = generate.merged_options(args, own)
    wanted = method_options.wanted_methods(getattr(args, "words", []), config)
    device = load_pipeline.pick_device(options.get("device", "auto"))
    load_pipeline.check_machine(options, device)
    load_pipeline.parse_loras(options.get("lora", []))
    load_pipeline.quiet(show_progress=False)
    _check_options(options)
    model = model_source.describe(options["model"], options.get("revision"))
    if model.transformer is None:
        raise DitAttnError(
            f"{model.pipeline.__name__} of {model.name} has no diffusion transformer, so there is nothing to calibrate"
        )
    chosen = method_options.resolve(wanted, model.transformer, options.get("preset"))
    if len(chosen) != 1:
        raise DitAttnError(f"calibrate takes one method, got {len(chosen)}; give --method NAME, e.g. rectified-spaattn")
    items, check = make_items(options, model)
    job_files.check_calls([*items, *check], model.pipeline)
    plan = _plan(chosen[0], options, calibrate_run.steps_of([*items, *check], model.pipeline))
    dtype = load_pipeline.pick_dtype(options.get("dtype", "auto"), model, device)
    name = f"calibrate-{Path(model.path).name or 'model'}-{plan.method.slug}"
    folder = Path(options.get("output") or Path("outputs") / name).expanduser()
    live = runner.new_run(None, model, (plan.method,), options, dtype, device, folder, args.argv)
    return calibrate_run.Setting(options, model, plan, items, check, live, device, dtype, folder)


def _check_options(options: dict[str, Any]) -> None:
    if "cost" in options and "error" in options:
        raise DitAttnError("--cost and --error are two budgets; give one of them")
    for name in ("cost", "error"):
        if options.get(name) == 0.0:
            raise DitAttnError(f"--{name} must be above 0, got 0")
    if "check" in options and "held_out" in options:
        raise DitAttnError("--check and --held-out are two sets of items to compare on; give one of them")
    repo = options.get("push_to_hub")
    if repo is not None and (repo.count("/") != 1 or not all(repo.split("/"))):
        raise DitAttnError(f"--push-to-hub must be ORG/NAME, got {repo!r}")


def _plan(method: Any, options: dict[str, Any], steps: int | None) -> Plan:
    from dit_attn.pipelines.calibrate.sensitivity import new_plan

    ladder = None
    if "densities" in options:
        try:
            ladder = [float(part) for part in options["densities"].split(",")]
        except ValueError as error:
            raise DitAttnError(
                f"--densities must be numbers with commas between, such as 0.5,0.25,0.125, got {options['densities']!r}"
            ) from error
    return new_plan(method, options.get("parts"), ladder, options.get("every"), steps)


def make_items(options: dict[str, Any], model: Source) -> tuple[list[Job], list[Job]]:
    """The items to calibrate on and those to compare on.

    Raises:
        DitAttnError: no prompts, too few of them, captions for a model that is not embedded, an item twice.
    """
    from dit_attn.cli import jobs as job_files

    options = {**options, "num_images_per_prompt": 1}
    written = "prompt" in options or "prompts" in options
    for name in ("held_out",) if written else ("held_out", "check"):
        if options.get(name) and model.kind != "embedded":
            _no_captions(name, options, model)
    if not written:
        if model.kind != "embedded":
            raise DitAttnError("no prompt; give --prompts FILE or --prompt TEXT several times")
        options["prompt"] = captions(model, False, options.get("items", ITEMS))
    jobs = job_files.make_jobs(options, model.defaults)
    count = options.get("check", 0) if written else 0
    items = options.get("items", max(len(jobs) - count, 1))
    if items + count > len(jobs):
        raise DitAttnError(
            f"--items {items} and --check {count} need {items + count} prompts, there are {len(jobs)}; give more "
            "prompts or smaller numbers"
        )
    check = jobs[items : items + count]
    number = options.get("held_out", 0 if written else options.get("check", 0))
    if number:
        texts = {**options, "prompt": captions(model, True, number), "seed": options.get("seed", 42) + APART}
        texts.pop("prompts", None)
        check = job_files.make_jobs(texts, model.defaults)
    found = [*jobs[:items], *check]
    for i, job in enumerate(found):
        if any(replace(job, index=0, where="") == replace(other, index=0, where="") for other in found[:i]):
            raise DitAttnError(
                f"{job.where}: {job.prompt!r} with seed {job.seed} is there twice; leave one of them out"
            )
    return jobs[:items], check


def _no_captions(name: str, options: dict[str, Any], model: Source) -> None:
    raise DitAttnError(
        f"--{name.replace('_', '-')} {options[name]} without prompts is for embedded models, which know the shapes "
        f"world, not for {model.name}; give --prompts FILE with --items N --check N"
    )


def captions(model: Source, held_out: bool, count: int) -> list[str]:
    """So many different captions of the shapes world in a seeded order, from training or held out from it."""
    import torch

    from dit_attn.eval.shapes_world import world

    kind = "video" if "num_frames" in model.defaults else "image"
    known = world.split(kind)[held_out]
    order = torch.randperm(len(known), generator=torch.Generator().manual_seed(0)).tolist()
    return [world.caption(known[i]) for i in order[:count]]


def _print_plan(setting: Setting) -> int:
    from dit_attn.cli.commands.calibrate import run as calibrate_run

    data = calibrate_run.description(setting)
    if setting.options.get("json"):
        print(json.dumps(data, indent=1, default=str))
        return 0
    lines = {
        "model": f"{data['model']} ({data['pipeline']}, {data['dtype']}, {data['device']})",
        "method": json.dumps({key: value for key, value in data["method"].items() if value is not None}),
        "folder": str(setting.folder),
        "budget": calibrate_run.budget_text(setting.options),
        "parts": f"{data['parts']} of {data['steps'] or '?'} steps, layers looked at every {data['every']} steps",
        "densities": ", ".join(f"{value:g}" for value in data["ladder"]),
    }
    print("\n".join(f"{key:<10}{value}" for key, value in lines.items()))
    for title, jobs in (("calibrate", setting.items), ("check", setting.check)):
        for job in jobs:
            print(f"  {title:<10}{job.prompt!r}, seed {job.seed}")
    return 0


def table(record: dict[str, Any]) -> str:
    """Densities by layer and part of the run, and errors beside one density for all, as text."""
    densities: list[list[float]] = record["densities"]
    layers, parts = range(len(densities[0])), len(densities)
    rows = [("part of the run \\ layer", *(str(layer) for layer in layers), "mean")]
    for part, row in enumerate(densities):
        name = f"{100 * part / parts:.0f} to {100 * (part + 1) / parts:.0f} %"
        rows.append((name, *(f"{value:.2f}" for value in row), f"{sum(row) / len(row):.2f}"))
    each = [[row[layer] for row in densities] for layer in layers]
    flat = [value for row in densities for value in row]
    rows.append(("mean", *(f"{sum(column) / parts:.2f}" for column in each), f"{sum(flat) / len(flat):.2f}"))
    checked = record["checked"]
    figures = [("", "executed", "expected error", *(("checked error [95 %]",) if checked else ()))]
    for name, found in record["expected"].items():
        label = name if name != "uniform" else f"uniform, density {record['uniform']['density']:.3g}"
        cost = checked[name]["cost"] if checked else found["cost"]
        measured = (_figure(checked[name]["error"]),) if checked else ()
        figures.append((label, f"{cost:.3f}", f"{found['error']:.4f}", *measured))
    lines = [*_columns(rows), "", *_columns(figures)]
    if checked:
        lines.append(f"errors, ours over uniform: {_figure(checked['ratio'])} over {checked['ratio']['n']} items")
    return "\n".join([*lines, "", f"saved     {record['file']}", f"use       --method {record['file']}"])


def _columns(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


def _figure(found: dict[str, Any]) -> str:
    interval = found["ci95"]
    return f"{found['value']:.4f}" + (f" [{interval[0]:.4f}, {interval[1]:.4f}]" if interval else "")
