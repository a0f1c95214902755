"""``dit-attn bench operators``: how far every way to read and to compensate is from dense, call by call."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from dit_attn.errors import DitAttnError, unknown

SOURCES = ("synthetic", "tiny-image", "tiny-video")
BLOCKS = {"synthetic": 64, "tiny-image": 32, "tiny-video": 36}
FLAGS = ("source", "prompts", "every", "grid", "steps", "family")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``bench operators``."""
    group = parser.add_argument_group("operators")
    group.add_argument("--source", default="tiny-image", metavar="NAME", help=f"{', '.join(SOURCES)}")
    group.add_argument("--prompts", type=int, default=6, metavar="N", help="held-out prompts, or seeds (default: 6)")
    group.add_argument("--steps", type=int, metavar="N", help="steps of a run (default: the model's own; synthetic: 8)")
    group.add_argument("--every", type=int, default=5, metavar="N", help="measure one step of N (default: 5)")
    group.add_argument("--grid", type=int, nargs=3, default=(16, 16, 16), metavar="N", help="T H W of synthetic fields")
    group.add_argument("--family", nargs="+", default=[], metavar="NAME", help="only these rows of the table")


def run(args: argparse.Namespace) -> int:
    """Measure and print. Returns 0.

    Raises:
        DitAttnError: an unknown source or family, a number out of range, a file that cannot be written.
    """
    import torch

    from dit_attn.cli import outputs
    from dit_attn.models.evaluate import current_commit
    from dit_attn.models.export import environment
    from dit_attn.pipelines.benchmark import equal_cost, operator_error

    block, densities = _check(args)
    found = equal_cost.chosen(args.family, block)
    if args.output:
        outputs.prepare_folder(Path(args.output).expanduser().parent)
    if args.threads:
        torch.set_num_threads(args.threads)
    probes = equal_cost.probes(found, densities or equal_cost.DENSITIES, block, args.every)
    about = operator_error.measure(_source(args), args.prompts, [probe for rungs in probes.values() for probe in rungs])
    record = {
        "what": "attention outputs of dense runs against every reader on the same q, k, v; runs stay dense",
        "command": _command(args),
        "commit": current_commit(),
        "environment": environment(),
        "source": args.source,
        "block": block,
        "prompts": args.prompts,
        "intervals": f"95 % bootstrap; unit: {equal_cost.UNIT}",
        **about,
        **equal_cost.summary(probes),
    }
    if args.output:
        outputs.write_json(record, Path(args.output).expanduser())
    print(json.dumps(record, indent=1, default=str) if args.json else table(record))
    return 0


def _check(args: argparse.Namespace) -> tuple[int, list[float]]:
    """Tokens per block and densities."""
    if args.source not in SOURCES:
        raise unknown("--source", args.source, SOURCES)
    for name in ("prompts", "every", "steps", "threads"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise DitAttnError(f"--{name} must be at least 1, got {value}")
    if min(args.grid) < 1 or math.prod(args.grid) < 256:
        raise DitAttnError(f"--grid must be three positive sizes with at least 256 tokens, got {tuple(args.grid)}")
    for value in args.density or ():
        if not 0.0 < value < 1.0:
            raise DitAttnError(f"--density must be above 0 and below 1, got {value}: at 1 every reader is dense")
    block = args.block or BLOCKS[args.source]
    if not 8 <= block <= 1024:
        raise DitAttnError(f"--block must be from 8 to 1024 tokens, got {block}")
    return block, sorted(args.density or (), reverse=True)


def _source(args: argparse.Namespace) -> Any:
    from dit_attn import models
    from dit_attn.eval.shapes_world import world
    from dit_attn.pipelines.benchmark import operator_error

    if args.source == "synthetic":
        return operator_error.synthetic_source(tuple(args.grid), steps=args.steps or 8)
    pipe, call = models.load(args.source), models.call_defaults(args.source)
    pipe.set_progress_bar_config(disable=True)
    kind = "video" if "num_frames" in call else "image"
    if args.steps:
        call["num_inference_steps"] = args.steps
    prompts = [world.caption(item) for item in world.held_out_sample(kind, args.prompts)]
    return operator_error.pipeline_source(pipe, prompts, call=call)


def _command(args: argparse.Namespace) -> str:
    """The command that repeats the measurement, without paths of this machine."""
    words: list[Any] = ["dit-attn bench operators --source", args.source, "--prompts", args.prompts]
    words += ["--every", args.every]
    words += ["--grid", *args.grid] if args.source == "synthetic" else []
    words += ["--steps", args.steps] if args.steps else []
    words += ["--block", args.block] if args.block else []
    words += ["--density", *args.density] if args.density else []
    words += ["--family", *(f'"{name}"' for name in args.family)] if args.family else []
    words += ["--threads", args.threads] if args.threads else []
    return " ".join(map(str, words))


def table(record: dict[str, Any]) -> str:
    """The record as text: every rung, errors at equal cost, and the targets."""
    place = record["environment"]
    lines = [
        f"{record['source']}: {record['prompts']} runs, {record['calls']} calls, blocks of {record['block']}; "
        f"{place['hardware']}, {place['threads']} threads, torch {place['torch']}",
        f"intervals: {record['intervals']}",
        f"{'':<36}{'cost':>7}{'l2':>9}{'':>17}{'shift':>9}{'rms':>9}{'ms':>8}{'x dense':>9}",
    ]
    for row in record["rows"]:
        lines.append(
            f"{row['label']:<36}{row['cost']:>7.3f}{_figure(row['l2'])}{row['shift']['value']:>9.4f}"
            f"{row['rms']['value']:>9.4f}{1e3 * row['seconds']:>8.1f}{row['seconds'] / record['dense_seconds']:>9.2f}"
        )
    for cost, found in record["equal_cost"]["rms"].items():
        best = list(found.items())[:5]
        lines.append(f"at cost {cost}, rms: " + "; ".join(f"{name} {figure['value']:.4f}" for name, figure in best))
    for target in record["targets"]:
        ratios = ", ".join(f"{cost}: {_figure(figure).strip()}" for cost, figure in target["at"].items())
        verdict = "met" if target["met"] else "missed"
        lines.append(f"default over {target['against']}, {target['error']} <= {target['limit']} {verdict}: {ratios}")
    return "\n".join(lines)


def _figure(figure: dict[str, Any] | None) -> str:
    if figure is None:
        return f"{'-':>9}{'':>17}"
    interval = figure["ci95"]
    ends = "" if interval is None else f"[{interval[0]:.4f}, {interval[1]:.4f}]"
    return f"{figure['value']:>9.4f}{ends:>17}"
