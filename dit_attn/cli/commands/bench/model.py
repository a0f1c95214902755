"""``dit-attn bench model``: one denoising step of a known transformer with random weights, dense and with methods."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dit_attn.cli import load_pipeline, method_options, outputs, resolve_methods
from dit_attn.cli.commands.bench.model_table import report
from dit_attn.cli.method_options import MethodSpec
from dit_attn.cli.options import Options
from dit_attn.cli.progress import StatusLine
from dit_attn.cli.table import show
from dit_attn.errors import DitAttnError
from dit_attn.files import is_place
from dit_attn.models import architectures
from dit_attn.models.architecture import Architecture
from dit_attn.models.evaluate import current_commit
from dit_attn.models.export import environment
from dit_attn.pipelines.benchmark import model_step
from dit_attn.pipelines.benchmark.frozen_step import STEPS, Competitor, make_competitor
from dit_attn.processors.attach.decision import settle
from dit_attn.processors.attach.families import family_of
from dit_attn.processors.attach.sites import eligible_layers
from dit_attn.processors.methods.auto import as_auto
from dit_attn.processors.methods.auto_choice import Decision
from dit_attn.processors.methods.base import Method
from dit_attn.processors.methods.sparse import as_sparse

ON_CPU = {"layers": 2, "heads": 2, "tokens": 4096}  # what a CPU gets without sizes and --full
METHODS = ("block-sparse", "rectified-spaattn", "re-ttention")
_SIZES = ("layers", "heads", "tokens", "height", "width", "frames")


@dataclass(frozen=True)
class ModelBenchConfig:
    """One measurement of a model's step, checked; no weights are made.

    Attributes:
        published: the transformer at its real size.
        arch: the transformer at the measured size.
        competitors: the methods.
        device, dtype: of the weights.
        sizes: the flags of sizes that were given.
        variants: the methods in the grammar of ``--method``, when they were given.
        decisions: what ``auto`` picks, in words, by variant.
        preset: of the methods.
        full: the real size on a CPU too.
        batch: samples.
        repeats: rounds.
        threads: of torch; ``None`` leaves them.
        output: file of the record.
        json: print JSON.
        verbose: print processor times and targets too.
    """

    published: Architecture
    arch: Architecture
    competitors: tuple[Competitor, ...]
    device: torch.device
    dtype: torch.dtype
    sizes: dict[str, int]
    variants: tuple[str, ...] = ()
    decisions: dict[str, str] = field(default_factory=dict)
    preset: str | None = None
    full: bool = False
    batch: int = 1
    repeats: int = 9
    threads: int | None = None
    output: Path | None = None
    json: bool = False
    verbose: bool = False

    @classmethod
    def from_options(cls, options: Options) -> ModelBenchConfig:
        """Read the flags, which :mod:`~dit_attn.cli.commands.bench.early` has checked.

        Raises:
            DitAttnError: a size out of range, a method the model cannot take, a device that is not there, too little
                memory.
        """
        types = options.get("dtype", [])
        published = architectures.architecture(options["config"])
        device = load_pipeline.pick_device(options.get("device", "auto"))
        small = "bfloat16" if device.type == "cuda" else "float32"
        dtype = getattr(torch, types[0] if types else small)
        arch = _scaled(published, options, device.type)
        given = method_options.method_variants(options)
        variants = given or [[MethodSpec(name)] for name in METHODS]
        competitors, decisions = _competitors(variants, arch, options.get("preset"), device, dtype)
        batch = options.get("batch", 1)
        arch.check_batch(batch)
        arch.check_memory(device, dtype, batch, _cached(competitors, arch, dtype.itemsize, batch))
        values = options.pick("preset", "full", "batch", "repeats", "threads", "json", "verbose")
        if "output" in options:
            values["output"] = Path(options["output"]).expanduser()
        labels = tuple(method_options.label(variant) for variant in given)
        return cls(published, arch, competitors, device, dtype, options.pick(*_SIZES), labels, decisions, **values)


def run(options: Options) -> int:
    """Measure and print. Returns 0.

    Raises:
        DitAttnError: bad input, or a file that cannot be written.
    """
    config = ModelBenchConfig.from_options(options)
    if config.threads:
        torch.set_num_threads(config.threads)
    if config.output:
        outputs.prepare_folder(config.output.parent)
    load_pipeline.quiet(show_progress=False)
    before = load_average()
    arch, device, dtype = config.arch, config.device, config.dtype
    model = arch.build(device, dtype)
    status = StatusLine(not config.json)
    found = model_step.measure_step(
        model, arch.call(device, dtype, config.batch), config.competitors, config.repeats, device, status
    )
    status("")
    record = {
        "what": "one denoising step of a transformer, dense and with methods in turns; medians; ratios are to the "
        "dense step of the same round and hold for this machine only",
        "note": model_step.NOTE,
        "command": _command(config),
        "commit": current_commit(),
        "environment": environment(),
        "load_average": {"before": before, "after": load_average(), "cores": os.cpu_count()},
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "model": _about(arch, config.published, model),
        "batch": config.batch,
        "decisions": config.decisions,
        "repeats": config.repeats,
        "target": "an attention call, choosing counted, at least 0.6 / executed density faster than dense",
        **found,
    }
    if config.output:
        outputs.write_json(record, config.output)
    if config.json:
        print(json.dumps(record, indent=1))
    else:
        show(*report(record, config.verbose))
    return 0


def _scaled(arch: Architecture, options: Options, device: str) -> Architecture:
    """The architecture at the requested size, or at one that a CPU can carry."""
    small = device != "cuda" and not options.get("full")
    sizes = {name: options.get(name, default if small else None) for name, default in ON_CPU.items()}
    arch = arch.at(*(options.get(name) for name in ("frames", "height", "width")))
    arch = arch.sized(sizes["layers"], sizes["heads"])
    if sizes["tokens"] and "height" not in options and "width" not in options:
        arch = arch.with_tokens(sizes["tokens"])
    return arch


def _competitors(
    variants: list[method_options.Variant],
    arch: Architecture,
    preset: str | None,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[tuple[Competitor, ...], dict[str, str]]:
    """The methods with the settings of the real model's preset, and what ``auto`` picks, in words.

    The dense layers of a preset are meant for the real depth. Where ``auto`` stays dense it is no competitor.

    Raises:
        DitAttnError: a method that is given twice or cannot be timed; ``auto`` alone, which stays dense.
    """
    found: dict[str, Competitor] = {}
    decisions: dict[str, str] = {}
    for specs in variants:
        label = method_options.label(specs)
        if label in found:
            raise DitAttnError(f"--method {label} is given twice; once is enough")
        methods, decision = _settled(resolve_methods.resolve(specs, arch.stand_in, preset), arch, device, dtype)
        if decision is not None:
            decisions[label] = "\n".join(decision.lines())
        if decision is not None and decision.method is None:
            if len(variants) == 1:
                raise DitAttnError(
                    f"--method {label} stays dense here: {decision.reason}; give more --tokens, or measure this "
                    "machine: dit-attn bench kernels --save"
                )
            continue
        if "layers" in arch.scaled:
            methods = tuple(_in_every_layer(spec, method) for spec, method in zip(specs, methods))
        found[label] = make_competitor(label, methods)
    return tuple(found.values()), decisions


def _settled(
    methods: tuple[Method, ...], arch: Architecture, device: torch.device, dtype: torch.dtype
) -> tuple[tuple[Method, ...], Decision | None]:
    """The methods with what ``auto`` picks in its place."""
    if not any(map(as_auto, methods)):
        return methods, None
    with torch.device("meta"):
        model = arch.build_class()(**arch.config)
    names = eligible_layers(model, family_of(model))
    return settle(model, methods, names, arch.grid, STEPS, text=arch.text, device=device, dtype=dtype)


def _cached(competitors: tuple[Competitor, ...], arch: Architecture, element: int, batch: int) -> int:
    """Bytes that the most demanding method caches on the device."""
    each = [
        one.method.cache_bytes(math.prod(arch.grid), arch.heads, arch.head_dim, element)
        for one in competitors
        if not one.method.cache_on_host
    ]
    return batch * arch.layers * max(each, default=0)


def _in_every_layer(spec: MethodSpec, method: Method) -> Method:
    """The method without the dense layers of a preset; those of the user's settings and files stay."""
    sparse = as_sparse(method)
    if sparse is None or "dense_layers" in spec.settings or is_place(spec.name):
        return method
    return dataclasses.replace(sparse, dense_layers=())


def _about(arch: Architecture, published: Architecture, model: Any) -> dict[str, Any]:
    frames, height, width = arch.pixels
    return {
        "config": arch.name,
        "transformer": arch.transformer,
        "weights": "random",
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "layers": arch.layers,
        "heads": arch.heads,
        "head_dim": arch.head_dim,
        "pixels": {"frames": frames, "height": height, "width": width},
        "grid": list(arch.grid),
        "visual_tokens": math.prod(arch.grid),
        "text_tokens": arch.text,
        "real_size": arch == published,
        "dense_layers_of_presets_left_out": "layers" in arch.scaled,
    }


def _command(config: ModelBenchConfig) -> str:
    """The command that repeats the measurement, without paths of this machine."""
    words: list[Any] = ["dit-attn bench model --config", config.arch.name, "--random-weights"]
    for label in config.variants:
        words += ["--method", f'"{label}"' if " " in label else label]
    words += ["--preset", config.preset] if config.preset else []
    for name, value in config.sizes.items():
        words += [f"--{name}", value]
    words += ["--threads", config.threads] if config.threads else []
    words += ["--full"] if config.full else []
    words += ["--dtype", str(config.dtype).removeprefix("torch."), "--batch", config.batch]
    words += ["--repeats", config.repeats, "--device", config.device]
    return " ".join(map(str, words))


def load_average() -> list[float] | None:
    """Return the load of the machine over 1, 5 and 15 minutes; ``None`` where there is no such figure."""
    return [round(value, 2) for value in os.getloadavg()] if hasattr(os, "getloadavg") else None
