"""``dit-attn bench``: how fast the kernels are on this machine, beside the dense call they replace."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from dit_attn.cli.commands.bench import capture as bench_capture
from dit_attn.cli.commands.bench import model as bench_model
from dit_attn.cli.commands.bench import operators as bench_operators
from dit_attn.cli.commands.bench import plot as bench_plot
from dit_attn.errors import DitAttnError, unknown

DENSITIES = (0.5, 0.25, 0.125, 0.0625)
DTYPES = ("float32", "bfloat16", "float16")


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Register ``bench`` and return its parser."""
    parser = subparsers.add_parser(
        "bench",
        help="measure kernels and methods",
        description="Measure block-sparse attention beside torch's dense attention, taking turns in one run. Figures "
        "are for this machine and these sizes; on a busy machine they mean little.",
    )
    parser.add_argument("what", choices=("kernels", "operators", "model", "capture"), help="what to do")
    parser.add_argument("--shape", metavar="NAME", help="tokens, heads and head size of a layer of a known model")
    parser.add_argument("--seq", type=int, metavar="S", help="tokens (default: 4096)")
    parser.add_argument("--heads", type=int, metavar="H", help="heads (default: 4)")
    parser.add_argument("--dim", type=int, metavar="D", help="size of a head (default: 128)")
    parser.add_argument("--batch", type=int, default=1, metavar="B", help="batch (default: 1)")
    parser.add_argument("--block", type=int, metavar="N", help="tokens per block (default: 128)")
    parser.add_argument("--dtype", nargs="+", metavar="T", help=", ".join(DTYPES))
    parser.add_argument("--density", type=float, nargs="+", metavar="P", help="parts of the key blocks kept")
    parser.add_argument("--repeats", type=int, default=9, metavar="N", help="rounds (default: 9)")
    parser.add_argument("--backend", metavar="NAME", help="kernel of the sparse calls (default: by capability)")
    parser.add_argument("--against", nargs="+", default=[], metavar="NAME", help="other kernels: flex, flashinfer, ...")
    parser.add_argument(
        "--inputs",
        metavar="KIND",
        help="random (default): noise, random blocks; structured: smooth fields, blocks by their scores, rows of "
        "different counts; or a file of bench capture",
    )
    parser.add_argument("--sharpness", type=float, default=1.0, metavar="X", help="spread of the logits (default: 1)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N (default: auto)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's own choice)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--output", "-o", metavar="FILE", help="write the JSON here")
    parser.add_argument("--plot", metavar="FILE", help="draw speed-up against density here (.png or .svg)")
    bench_operators.add_arguments(parser)
    bench_model.add_arguments(parser)
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Measure and print. Returns 0.

    Raises:
        DitAttnError: a size out of range, an unknown type, a device that is not there, a file that cannot be written.
    """
    if args.what == "operators":
        return bench_operators.run(args)
    if args.what == "model":
        return bench_model.run(args)
    if args.what == "capture":
        return bench_capture.run(args)
    import torch

    from dit_attn.cli import load_pipeline, outputs
    from dit_attn.kernels.benchmark import measure
    from dit_attn.kernels.benchmark.third_party import THIRD_PARTY
    from dit_attn.models.evaluate import current_commit
    from dit_attn.models.export import environment

    _complete(args, measure.SHAPES)
    _check(args)
    if args.plot:
        bench_plot.check(Path(args.plot))
    device = load_pipeline.pick_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    for file in filter(None, (args.output, args.plot)):
        outputs.prepare_folder(Path(file).expanduser().parent)
    found = {}
    for name in args.dtype:
        given = _inputs(args, getattr(torch, name), device)
        found[name] = measure.measure(given, args.repeats, args.backend, args.against)
        args.batch, args.seq, args.heads, args.dim = given.q.shape
    timed = {name for report in found.values() for row in report.rows for name in row.others}
    notes = {name: library.note for name, library in THIRD_PARTY.items() if name in timed}
    record = {
        "what": "dense and block-sparse attention in turns; shortest times; ratios are for this machine only",
        "command": _command(args),
        "commit": current_commit(),
        "environment": environment(),
        "device": str(device),
        "shape": {"batch": args.batch, "seq": args.seq, "heads": args.heads, "dim": args.dim, "block": args.block},
        "repeats": args.repeats,
        "sharpness": args.sharpness,
        "inputs": given.kind,
        "rows": {name: [row.to_dict() for row in report.rows] for name, report in found.items()},
        "dense": {name: measure.rounded(report.dense) for name, report in found.items()},
        "failed": {name: report.failed for name, report in found.items()},
        "notes": notes,
    }
    if args.output:
        outputs.write_json(record, Path(args.output).expanduser())
    if args.plot:
        bench_plot.plot(record, Path(args.plot).expanduser())
    print(json.dumps(record, indent=1) if args.json else _table(record))
    return 0


def _inputs(args: argparse.Namespace, dtype: Any, device: Any) -> Any:
    """What is measured."""
    from dit_attn.kernels.benchmark import inputs

    if args.inputs not in inputs.KINDS:
        return inputs.captured_inputs(Path(args.inputs).expanduser(), dtype, device, args.density, args.block)
    make = inputs.random_inputs if args.inputs == "random" else inputs.structured_inputs
    shape = inputs.Shape(args.batch, args.seq, args.heads, args.dim, args.block)
    return make(shape, dtype, device, args.density, args.sharpness)


def _complete(args: argparse.Namespace, shapes: dict[str, tuple[int, int, int]]) -> None:
    """Fill in the sizes that were not given: from the named shape, or the defaults."""
    args.inputs = args.inputs or "random"
    if args.inputs.endswith(".safetensors"):
        for name, default in (("shape", None), ("seq", None), ("heads", None), ("dim", None), ("batch", 1)):
            if getattr(args, name) != default:
                raise DitAttnError(f"--{name} is not for recorded --inputs, which have their own size; leave it out")
    if args.shape is not None and args.shape not in shapes:
        raise unknown("--shape", args.shape, shapes)
    sizes = shapes[args.shape] if args.shape else (4096, 4, 128)
    for name, size in zip(("seq", "heads", "dim"), sizes):
        if getattr(args, name) is None:
            setattr(args, name, size)
    args.block = 128 if args.block is None else args.block
    args.density = args.density or list(DENSITIES)
    args.dtype = args.dtype or ["float32", "bfloat16"]


def _check(args: argparse.Namespace) -> None:
    others = argparse.ArgumentParser(add_help=False)  # flags of the other things to do, and their defaults
    bench_operators.add_arguments(others)
    bench_model.add_arguments(others)
    for name, default in vars(others.parse_args([])).items():
        if getattr(args, name) != default:
            raise DitAttnError(f"--{name.replace('_', '-')} is not for bench kernels; leave it out")
    for name in ("seq", "heads", "dim", "batch", "block", "repeats", "threads"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise DitAttnError(f"--{name} must be at least 1, got {value}")
    if not args.sharpness > 0.0:
        raise DitAttnError(f"--sharpness must be above 0, got {args.sharpness}: it is the spread of the logits")
    for value in args.density:
        if not 0.0 < value <= 1.0:
            raise DitAttnError(f"--density must be above 0 and at most 1, got {value}: it is the part of blocks kept")
    for name in args.dtype:
        if name not in DTYPES:
            raise unknown("--dtype", name, DTYPES)
    if args.inputs not in ("random", "structured") and not args.inputs.endswith(".safetensors"):
        raise DitAttnError(f"--inputs is random, structured or a .safetensors file of bench capture, got {args.inputs}")


def _command(args: argparse.Namespace) -> str:
    """The command that repeats the measurement, without paths of this machine."""
    words: list[Any] = ["dit-attn bench", args.what]
    if args.inputs in ("random", "structured"):
        words += ["--seq", args.seq, "--heads", args.heads, "--dim", args.dim, "--batch", args.batch]
    words += ["--block", args.block, "--dtype", *args.dtype, "--density", *args.density]
    words += ["--backend", args.backend] if args.backend else []
    words += ["--against", *args.against] if args.against else []
    words += [] if args.inputs == "random" else ["--inputs", Path(args.inputs).name]
    words += ["--sharpness", args.sharpness] if args.sharpness != 1.0 else []
    words += ["--repeats", args.repeats, *(["--threads", args.threads] if args.threads else [])]
    return " ".join(map(str, words))


def _table(record: dict[str, Any]) -> str:
    shape, place = record["shape"], record["environment"]
    lines = [
        f"B {shape['batch']}, S {shape['seq']}, H {shape['heads']}, D {shape['dim']}, blocks of {shape['block']} on "
        f"{record['device']}: {place['hardware']}, {place['threads']} threads, torch {place['torch']}",
        f"{'type':<10}{'density':>8}{'dense':>11}{'sparse':>11}{'speed-up':>10}{'efficiency':>12}{'selection':>11}"
        f"{'error':>10}{'(dense)':>10}{'TFLOP/s':>10}",
    ]
    for name, rows in record["rows"].items():
        lines += [
            f"{name:<10}{row['density']:>8.3f}{row['dense_ms']:>8.1f} ms{row['sparse_ms']:>8.1f} ms"
            f"{row['speedup']:>9.2f}x{row['efficiency']:>12.2f}{row['selection_ms']:>8.2f} ms"
            f"{row['error']:>10.1e}{row['dense_error']:>10.1e}{row['tflops']:>10.3g}"
            + "".join(f"  {other} {ms:.1f} ms" for other, ms in row["others"].items())
            for row in rows
        ]
        lines += [f"{name:<10}{rival}: not measured, {why}" for rival, why in record["failed"][name].items()]
    lines += [f"{rival}: {note}" for rival, note in record["notes"].items()]
    return "\n".join(lines)
