"""``dit-attn calibrate``: densities by layer and part of the run, from a few prompts and a budget, as one file."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from dit_attn.cli import options as flags
from dit_attn.cli import parser as parsers
from dit_attn.cli.commands.calibrate import early
from dit_attn.cli.progress import loading_libraries
from dit_attn.cli.table import Table, fields, show
from dit_attn.errors import DitAttnError, RunStopped, reason
from dit_attn.pipelines.run import JobFailed

if TYPE_CHECKING:
    from dit_attn.cli.commands.calibrate.config import CalibrateConfig

_OWN = (
    flags.Flag("items", "calibrate on so many prompts", int, "all that are not checked on; captions: 4", low=1),
    flags.Flag("check", "compare with one density for all on so many prompts after them", int, "0", low=0),
    flags.Flag("held-out", "compare on so many held-out captions of the shapes world, for embedded models", int, low=1),
    flags.Flag("cost", "budget: attention computed in the run, as a share of dense, e.g. 0.3", float,
               "that of one density for all", low=0.0, high=1.0),
    flags.Flag("error", "budget: largest expected relative error of the final latents, e.g. 0.05", float, low=0.0),
    flags.Flag("parts", "equal parts of the run, each with densities of its own", int, "10, at most the steps", low=1),
    flags.Flag("by-head", "densities of every head, not of every layer alone", bool),
    flags.Flag("every", "measure the layers' own errors at one step of N", int, "one of every part", low=1),
    flags.Flag("densities", "densities to measure, e.g. 0.5,0.25,0.125", default="0.75 to 0.0625 in 7 steps",
               metavar="X,X"),
)  # fmt: skip
GROUPS = {
    "model": (*flags.MODEL, *flags.WEIGHTS),
    "methods": flags.PRESET,
    "prompts": flags.PROMPT,
    "calibration": _OWN,
    "size": flags.SIZE,
    "sampling": flags.without(flags.SAMPLING, "num-images-per-prompt"),
    "output": (
        *flags.without(flags.OUTPUT, "contact-sheet", "fps"),
        flags.Flag("push-to-hub", "upload the result to this repository of the Hugging Face Hub", metavar="ORG/NAME"),
    ),
    "run": flags.without(flags.RUN, "compile"),
    "workers": flags.WORKERS,
}
_METHOD = (
    "the method to calibrate, with its settings: one sparse method with a density, e.g. rectified-spaattn (required)"
)
_EXAMPLES = """examples:
  dit-attn calibrate --model tiny-video --method rectified-spaattn \\
      --items 2 --held-out 12 --parts 5
  dit-attn calibrate --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers \\
      --method rectified-spaattn --prompts prompts.txt --items 4 --check 8 \\
      --error 0.05 --output outputs/wan --workers auto --resume
  dit-attn generate --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --prompt "a cat" \\
      --method outputs/wan/dit_attn_method.json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``calibrate``."""
    parsers.describe(
        parser,
        "calibrate --model NAME --method NAME [--prompts FILE] [options]",
        "Measure what sparse attention does to the result, layer by layer and part by part of the run, choose "
        "densities for a budget of cost or of error, check them on other prompts, and write them as one file that "
        "enable() and --method take.",
        _EXAMPLES,
    )
    parsers.add_groups(parser, GROUPS, _METHOD)


def run(args: argparse.Namespace) -> int:
    """Check everything, load once, measure what is missing, write the file.

    Returns:
        0, 1 when a run failed, 130 after Ctrl-C.

    Raises:
        DitAttnError: bad input, before anything is loaded where that can be known.
    """
    options = flags.merge(args, GROUPS)
    early.check(options)
    with loading_libraries(not options.get("json")):
        from dit_attn.cli.commands.calibrate import run as calibrate_run
        from dit_attn.cli.commands.calibrate.config import CalibrateConfig

    config = CalibrateConfig.from_options(options)
    if config.dry_run:
        _print_plan(config)
        return 0
    saved = f"what is measured is in {config.folder}; run the same command with --resume to go on"
    try:
        record = calibrate_run.run_all(config)
    except KeyboardInterrupt:
        print(f"dit-attn: interrupted; {saved}", file=sys.stderr)
        return 130
    except (DitAttnError, RunStopped):
        raise
    except JobFailed as error:
        print(f"dit-attn: a run failed: {error}; {saved}", file=sys.stderr)
        return 1
    except (RuntimeError, ValueError, TypeError, NotImplementedError, AttributeError) as error:
        if "--debug" in sys.argv:
            raise
        print(f"dit-attn: a run failed: {type(error).__name__}: {reason(error)}; {saved}", file=sys.stderr)
        return 1
    if config.json:
        print(json.dumps(record, indent=1, default=str))
    else:
        _show(record)
    return 0


def _print_plan(config: CalibrateConfig) -> None:
    from dit_attn.cli import run_record
    from dit_attn.cli.commands.calibrate import run as calibrate_run

    data = calibrate_run.description(config)
    if config.json:
        print(json.dumps(data, indent=1, default=str))
        return
    about = {
        **run_record.describe_setup(config.new_run()),
        "budget": config.budget,
        "parts": f"{data['parts']} of {data['steps'] or '?'} steps, layers measured every {data['every']} steps",
        "densities": ", ".join(f"{value:g}" for value in data["ladder"]),
    }
    uses = (("calibrate", config.items), ("check", config.check))
    rows = [(use, repr(job.prompt), str(job.seed)) for use, jobs in uses for job in jobs]
    show(fields(about), "", Table(("use", "prompt", ">seed"), rows, folded=("prompt",)))


def _show(record: dict[str, Any]) -> None:
    """Print densities by layer and part of the run, and errors next to one density for all."""
    densities: list[list[float]] = [
        [sum(cell) / len(cell) if isinstance(cell, list) else cell for cell in row] for row in record["densities"]
    ]
    layers, parts = range(len(densities[0])), len(densities)
    rows = []
    for part, row in enumerate(densities):
        name = f"{100 * part / parts:.0f} to {100 * (part + 1) / parts:.0f} %"
        rows.append((name, *(f"{value:.2f}" for value in row), f"{sum(row) / len(row):.2f}"))
    flat = [value for row in densities for value in row]
    means = [sum(row[layer] for row in densities) / parts for layer in layers]
    rows.append(("mean", *(f"{value:.2f}" for value in means), f"{sum(flat) / len(flat):.2f}"))
    by_layer = Table(("part of the run \\ layer", *(f">{layer}" for layer in layers), ">mean"), rows)
    checked = record["checked"]
    figures = []
    for name, found in record["expected"].items():
        label = name if name != "uniform" else f"uniform, density {record['uniform']['density']:.3g}"
        cost = checked[name]["cost"] if checked else found["cost"]
        measured = (_figure(checked[name]["error"]),) if checked else ()
        figures.append((label, f"{100 * cost:.1f} %", f"{found['error']:.4f}", *measured))
    titles = ("densities", ">attention computed", ">expected error", *((">checked error [95 %]",) if checked else ()))
    report: list[str | Table] = [by_layer, "", Table(titles, figures)]
    if checked:
        ratio = checked["ratio"]
        report += ["", verdict(ratio)]
        if "head_ratio" in checked:
            report.append(f"errors, calibrated over the same cost by layer alone: {_figure(checked['head_ratio'])}")
    show(*report, "", fields({"saved": record["file"], "use": f"--method {record['file']}"}))


def verdict(ratio: dict[str, Any]) -> str:
    """Return in words whether calibrated densities are better than one density for all, at the same cost.

    Args:
        ratio: of the errors: ``value``, ``ci95`` (``None`` with one item), ``n`` items.
    """
    count = f"{ratio['n']} item{'s' * (ratio['n'] != 1)}"
    text = f"{ratio['value']:.2f} times the error of one density for all, over {count}"
    if not ratio["ci95"]:
        return f"Verdict: {text}; too few to tell: check more, --held-out 12 or --check 8"
    low, high = ratio["ci95"]
    text += f" (95 %: {low:.2f} to {high:.2f})"
    if high < 1.0:
        return f"Verdict: better, {text}"
    return f"Verdict: worse, {text}; use one density" if low > 1.0 else f"Verdict: no difference shown, {text}"


def _figure(found: dict[str, Any]) -> str:
    interval = found["ci95"]
    return f"{found['value']:.4f}" + (f" [{interval[0]:.4f}, {interval[1]:.4f}]" if interval else "")
