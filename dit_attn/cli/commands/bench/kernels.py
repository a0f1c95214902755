"""``dit-attn bench kernels``: block-sparse attention next to the dense call it replaces, in turns."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dit_attn.cli import load_pipeline, outputs
from dit_attn.cli.commands.bench import costs, plot
from dit_attn.cli.options import Options
from dit_attn.cli.table import Table, show
from dit_attn.kernels import build_cpp
from dit_attn.kernels.backends.preference import CPP
from dit_attn.kernels.benchmark import inputs, measure
from dit_attn.kernels.benchmark.third_party import THIRD_PARTY
from dit_attn.models.evaluate import current_commit
from dit_attn.models.export import environment


@dataclass(frozen=True)
class KernelBenchConfig:
    """One measurement of kernels, checked.

    Attributes:
        device: where it runs.
        shape: batch, tokens, heads, head size and block; those of recorded inputs are in their file.
        dtype: names of the types.
        density: parts of the key blocks computed.
        backend: kernel of the sparse calls; ``None``: by capability.
        against: other kernels.
        inputs: ``"random"``, ``"structured"`` or a file of ``bench capture``.
        sharpness: spread of the logits.
        repeats: rounds.
        threads: of torch; ``None`` leaves them.
        output, plot: files.
        json: print JSON.
    """

    device: torch.device
    shape: inputs.Shape
    dtype: tuple[str, ...] = ("float32", "bfloat16")
    density: tuple[float, ...] = (0.5, 0.25, 0.125, 0.0625)
    backend: str | None = None
    against: tuple[str, ...] = ()
    inputs: str = "random"
    sharpness: float = 1.0
    repeats: int = 9
    threads: int | None = None
    output: Path | None = None
    plot: Path | None = None
    json: bool = False

    @classmethod
    def from_options(cls, options: Options) -> KernelBenchConfig:
        """Read the flags, which :mod:`~dit_attn.cli.commands.bench.early` has checked.

        Raises:
            DitAttnError: a device that is not there.
        """
        known = measure.SHAPES[options["shape"]] if "shape" in options else (4096, 4, 128)
        seq, heads, dim = (options.get(name, size) for name, size in zip(("seq", "heads", "dim"), known))
        shape = inputs.Shape(options.get("batch", 1), seq, heads, dim, options.get("block", 128))
        values = options.pick("backend", "inputs", "sharpness", "repeats", "threads", "json")
        values |= {name: tuple(value) for name, value in options.pick("dtype", "density", "against").items()}
        values |= {name: Path(text).expanduser() for name, text in options.pick("output", "plot").items()}
        return cls(load_pipeline.pick_device(options.get("device", "auto")), shape, **values)


def run(options: Options) -> int:
    """Measure and print. Returns 0.

    Raises:
        DitAttnError: bad input, or a file that cannot be written.
    """
    if options.get("save"):
        return costs.save(options)
    config = KernelBenchConfig.from_options(options)
    if config.threads:
        torch.set_num_threads(config.threads)
    for file in filter(None, (config.output, config.plot)):
        outputs.prepare_folder(file.parent)
    if CPP in (config.backend, *config.against):
        build_cpp()
    found = {}
    for name in config.dtype:
        given = _inputs(config, getattr(torch, name))
        found[name] = measure.measure(given, config.repeats, config.backend, config.against)
    batch, seq, heads, dim = given.q.shape
    timed = {name for report in found.values() for row in report.rows for name in row.others}
    record = {
        "what": "dense and block-sparse attention in turns; shortest times; ratios are for this machine only",
        "command": _command(config),
        "commit": current_commit(),
        "environment": environment(),
        "device": str(config.device),
        "shape": {"batch": batch, "seq": seq, "heads": heads, "dim": dim, "block": config.shape.block},
        "repeats": config.repeats,
        "sharpness": config.sharpness,
        "inputs": given.kind,
        "densities": list(config.density),
        "rows": {name: [row.to_dict() for row in report.rows] for name, report in found.items()},
        "dense": {name: measure.rounded(report.dense) for name, report in found.items()},
        "failed": {name: report.failed for name, report in found.items()},
        "notes": {name: library.note for name, library in THIRD_PARTY.items() if name in timed},
    }
    if config.output:
        outputs.write_json(record, config.output)
    if config.plot:
        plot.plot(record, config.plot)
    if config.json:
        print(json.dumps(record, indent=1))
    else:
        _show(record)
    return 0


def _inputs(config: KernelBenchConfig, dtype: torch.dtype) -> Any:
    """Make or read what is measured."""
    if config.inputs not in inputs.KINDS:
        file = Path(config.inputs).expanduser()
        return inputs.captured_inputs(file, dtype, config.device, config.density, config.shape.block)
    make = inputs.random_inputs if config.inputs == "random" else inputs.structured_inputs
    return make(config.shape, dtype, config.device, config.density, config.sharpness)


def _command(config: KernelBenchConfig) -> str:
    """The command that repeats the measurement, without paths of this machine."""
    shape = config.shape
    words: list[Any] = ["dit-attn bench kernels"]
    if config.inputs in inputs.KINDS:
        words += ["--seq", shape.seq, "--heads", shape.heads, "--dim", shape.dim, "--batch", shape.batch]
    words += ["--block", shape.block, "--dtype", *config.dtype, "--density", *config.density]
    words += ["--backend", config.backend] if config.backend else []
    words += ["--against", *config.against] if config.against else []
    words += [] if config.inputs == "random" else ["--inputs", Path(config.inputs).name]
    words += ["--sharpness", config.sharpness] if config.sharpness != 1.0 else []
    words += ["--repeats", config.repeats, *(["--threads", config.threads] if config.threads else [])]
    return " ".join(map(str, words))


def same_work(record: dict[str, Any]) -> list[str]:
    """Return a line for densities that come to the same number of blocks, which is the same work."""
    shape, lines = record["shape"], []
    blocks = -(-shape["seq"] // shape["block"])
    rows: list[dict[str, Any]] = next(iter(record["rows"].values()), [])
    found: dict[tuple[Any, ...], list[float]] = {}
    for density, row in zip(record["densities"], rows):
        found.setdefault((row["density"], *row["counts"].values()), []).append(density)
    for (density, *_), given in found.items():
        if len(given) > 1:
            names = " and ".join(f"{value:g}" for value in given)
            lines.append(
                f"densities {names} come to the same blocks ({100 * density:.1f} % of {blocks} a row): their rows are "
                "the same work; give a smaller --block, or more tokens"
            )
    return lines


def _show(record: dict[str, Any]) -> None:
    shape, place = record["shape"], record["environment"]
    others = list(dict.fromkeys(name for rows in record["rows"].values() for row in rows for name in row["others"]))
    table = [
        (
            name, f"{100 * row['density']:.1f} %", f"{row['dense_ms']:.1f} ms", f"{row['sparse_ms']:.1f} ms",
            f"{row['speedup']:.2f}x", f"{row['efficiency']:.2f}", f"{row['selection_ms']:.2f} ms",
            f"{row['error']:.1e}", f"{row['dense_error']:.1e}", f"{row['tflops']:.3g}",
            *(f"{row['others'][other]:.1f} ms" if other in row["others"] else "-" for other in others),
        )
        for name, rows in record["rows"].items()
        for row in rows
    ]  # fmt: skip
    titles = (
        "type", ">computed", ">dense", ">sparse", ">speed-up", ">efficiency", ">selection", ">error", ">(dense)",
        ">TFLOP/s", *(f">{other}" for other in others),
    )  # fmt: skip
    show(
        f"B {shape['batch']}, S {shape['seq']}, H {shape['heads']}, D {shape['dim']}, blocks of {shape['block']} on "
        f"{record['device']}: {place['hardware']}, {place['threads']} threads, torch {place['torch']}",
        Table(titles, table),
        *same_work(record),
        *(
            f"{name}  {library}: not measured, {why}"
            for name, failed in record["failed"].items()
            for library, why in failed.items()
        ),
        *(f"{library}: {note}" for library, note in record["notes"].items()),
    )
