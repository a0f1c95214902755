"""``dit-attn bench operators``: the error of every way to select blocks and to compensate, call by call."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dit_attn import models
from dit_attn.cli import load_pipeline, method_options, outputs, resolve_methods
from dit_attn.cli.captions import held_out_captions
from dit_attn.cli.commands.bench import early
from dit_attn.cli.method_options import MethodSpec
from dit_attn.cli.options import Options
from dit_attn.cli.table import Table, show
from dit_attn.errors import DitAttnError
from dit_attn.files import is_place
from dit_attn.models.evaluate import current_commit
from dit_attn.models.export import environment
from dit_attn.pipelines.benchmark import equal_cost, operator_error, random_blocks
from dit_attn.pipelines.benchmark.equal_cost import MethodFamily
from dit_attn.processors.methods.base import Method

BLOCKS = {"synthetic": 64, "wan2.1-1.3b": 64, "tiny-image": 32, "tiny-joint": 32, "tiny-multi": 32, "tiny-video": 36}
_TITLES = (
    "method", ">attention computed", ">L2 error [95 %]", ">cosine", ">shift", ">LSE", ">RMS error", ">choosing",
    ">call", ">against dense",
)  # fmt: skip
_RUN = 50  # steps of a run, to see whether a method has several kinds of them


@dataclass(frozen=True)
class OperatorBenchConfig:
    """One measurement of operators, checked.

    Attributes:
        families: the rows of the table.
        source: where the calls come from.
        block: tokens per block.
        density: of the rows.
        family: the names that were given.
        methods: the further methods, in the grammar of ``--method``.
        prompts: held-out prompts, or seeds.
        steps: of a run; ``None``: the model's own.
        every: one step of so many is measured.
        grid: (T, H, W) tokens where the calls are made of random numbers.
        size: ``height`` and ``width`` in pixels, as far as they are given.
        threads: of torch; ``None`` leaves them.
        device: torch device of the model.
        output: file of the record.
        json: print JSON.
        verbose: print the targets too.
    """

    families: tuple[MethodFamily, ...]
    source: str
    block: int
    density: tuple[float, ...] = equal_cost.DENSITIES
    family: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()
    prompts: int = 6
    steps: int | None = None
    every: int = 5
    grid: tuple[int, int, int] = (16, 16, 16)
    size: dict[str, int] = field(default_factory=dict)
    threads: int | None = None
    device: Any = "cpu"
    output: Path | None = None
    json: bool = False
    verbose: bool = False

    @classmethod
    def from_options(cls, options: Options) -> OperatorBenchConfig:
        """Read the flags, which :mod:`~dit_attn.cli.commands.bench.early` has checked, and make the rows.

        Raises:
            DitAttnError: an unknown family, or a method that makes no row.
        """
        source, grid = options.get("source", "tiny-image"), options.get("grid", (16, 16, 16))
        block = options.get("block", BLOCKS[source])
        variants, names = method_options.method_variants(options), tuple(options.get("family", ()))
        families = equal_cost.select_families(names, block) if names or not variants else []
        families += [_family(specs, block) for specs in variants]
        values = options.pick("prompts", "steps", "every", "threads", "json", "verbose")
        values["device"] = load_pipeline.pick_device(options.get("device", "auto"))
        values |= {"grid": tuple(grid), "size": options.pick("height", "width"), "family": names}
        values["methods"] = tuple(map(method_options.label, variants))
        if "density" in options:
            values["density"] = tuple(sorted(options["density"], reverse=True))
        if "output" in options:
            values["output"] = Path(options["output"]).expanduser()
        return cls(tuple(families), source, block, **values)


def run(options: Options) -> int:
    """Measure and print. Returns 0.

    Raises:
        DitAttnError: bad input, or a file that cannot be written.
    """
    config = OperatorBenchConfig.from_options(options)
    if config.output:
        outputs.prepare_folder(config.output.parent)
    if config.threads:
        torch.set_num_threads(config.threads)
    probes = equal_cost.make_probes(config.families, config.density, config.block, config.every)
    everyone = [probe for each in probes.values() for probe in each]
    about = operator_error.measure_operators(_source(config), config.prompts, everyone)
    record = {
        "what": "attention outputs of dense runs against every method on the same q, k, v; runs stay dense",
        "command": _command(config),
        "commit": current_commit(),
        "environment": environment(),
        "source": config.source,
        **config.size,
        "block": config.block,
        "prompts": config.prompts,
        "intervals": f"95 % bootstrap; unit: {equal_cost.UNIT}",
        **about,
        **equal_cost.summarize_families(probes),
    }
    if config.output:
        outputs.write_json(record, config.output)
    if config.json:
        print(json.dumps(record, indent=1, default=str))
    else:
        _show(record, config.verbose)
    return 0


def _family(specs: list[MethodSpec], block: int) -> MethodFamily:
    """A row of the table for ``--method``, at any density; its other settings are the user's, or those of a file."""
    label = method_options.label(specs)
    if len(specs) != 1:
        raise DitAttnError(f"--method {label}: bench operators measures one method per row; repeat --method")
    (spec,) = specs
    if "density" in spec.settings:
        raise DitAttnError(f"--method {label}: every row is measured at all densities; give them with --density")

    def make(density: float, size: int) -> Method:
        own = {} if is_place(spec.name) else {"q_block": size, "kv_block": size, "dense_steps": 0}
        settings = {"density": density, **own, **spec.settings}
        (method,) = resolve_methods.resolve([MethodSpec(spec.name, settings)], None, "none")
        return method.synchronized()

    return MethodFamily(label, make, stateful=len(make(0.25, block).phases(_RUN)) > 1)


def _source(config: OperatorBenchConfig) -> Any:
    if config.source == "synthetic":
        return operator_error.synthetic_source(config.grid, steps=config.steps or 8)
    if config.source in early.MADE:
        return random_blocks.wan_source(random_blocks.wan_blocks(config.grid), steps=config.steps or 8)
    pipe, call = models.load(config.source), models.call_defaults(config.source) | config.size
    pipe.to(config.device)
    pipe.set_progress_bar_config(disable=True)
    if config.steps:
        call["num_inference_steps"] = config.steps
    return operator_error.pipeline_source(pipe, held_out_captions(call, config.prompts), call=call)


def _command(config: OperatorBenchConfig) -> str:
    """The command that repeats the measurement, without paths of this machine."""
    words: list[Any] = ["dit-attn bench operators --source", config.source, "--prompts", config.prompts]
    words += ["--every", config.every]
    words += ["--grid", *config.grid] if config.source in early.MADE else []
    words += [word for name, pixels in config.size.items() for word in (f"--{name}", pixels)]
    words += ["--steps", config.steps] if config.steps else []
    words += ["--block", config.block] if config.block != BLOCKS[config.source] else []
    words += ["--density", *config.density] if config.density != equal_cost.DENSITIES else []
    words += ["--family", *(f'"{name}"' for name in config.family)] if config.family else []
    for label in config.methods:
        words += ["--method", f'"{label}"' if " " in label else label]
    words += ["--threads", config.threads] if config.threads else []
    words += ["--device", config.device] if str(config.device) != "cpu" else []
    return " ".join(map(str, words))


def _show(record: dict[str, Any], verbose: bool) -> None:
    """Print every row, errors at equal cost, and where it is asked for the targets."""
    place = record["environment"]
    rows = [
        (
            row["label"], f"{100 * row['cost']:.1f} %", _figure(row["l2"]), _value(row["angle"], lambda x: 1.0 - x),
            _value(row["shift"]), _value(row["lse"]), _value(row["rms"]), f"{1e3 * row['choosing']:.1f} ms",
            f"{1e3 * row['seconds']:.1f} ms",
            f"{record['dense_seconds'] / row['seconds']:.2f}x",
        )
        for row in record["rows"]
    ]  # fmt: skip
    lines = []
    for cost, found in record["equal_cost"]["rms"].items():
        best = list(found.items())[:5]
        if best:
            errors = "; ".join(f"{name} {figure['value']:.4f}" for name, figure in best)
            lines.append(f"RMS error where {100 * float(cost):.0f} % is computed: {errors}")
    for target in record["targets"] if verbose else ():
        ratios = ", ".join(f"{cost}: {_figure(figure)}" for cost, figure in target["at"].items())
        verdict = "met" if target["met"] else "missed"
        lines.append(f"default over {target['against']}, {target['error']} <= {target['limit']} {verdict}: {ratios}")
    show(
        f"{record['source']}: {record['prompts']} runs, {record['calls']} calls, blocks of {record['block']}; "
        f"{place['hardware']}, {place['threads']} threads, torch {place['torch']}",
        f"intervals: {record['intervals']}",
        Table(_TITLES, rows),
        _at_equal_cost(record),
        *lines,
    )


def _at_equal_cost(record: dict[str, Any]) -> Table:
    """The L2 error of every family at every cost that some family reaches, best first at the dearest."""
    found = {cost: figures for cost, figures in record["equal_cost"]["l2"].items() if figures}
    names = dict.fromkeys(name for cost in reversed(found) for name in found[cost])
    rows = [(name, *(_figure(found[cost].get(name)) for cost in found)) for name in names]
    return Table(("L2 error where so much is computed", *(f">{100 * float(cost):g} %" for cost in found)), rows)


def _value(figure: dict[str, Any] | None, of: Callable[[float], float] = float) -> str:
    return "-" if figure is None else f"{of(figure['value']):.4f}"


def _figure(figure: dict[str, Any] | None) -> str:
    if figure is None:
        return "-"
    interval = figure["ci95"]
    return f"{figure['value']:.4f}" + ("" if interval is None else f" [{interval[0]:.4f}, {interval[1]:.4f}]")
