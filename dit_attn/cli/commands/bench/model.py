"""``dit-attn bench model``: one denoising step of a known transformer with random weights, dense beside methods."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_attn.errors import DitAttnError, unknown

if TYPE_CHECKING:
    from dit_attn.cli.method_options import Wanted
    from dit_attn.models.architectures import Architecture
    from dit_attn.pipelines.benchmark.model_step import Competitor
    from dit_attn.processors.methods.base import Method

CONFIGS = ("wan2.1-1.3b", "wan2.1-14b", "hunyuan-video", "cogvideox-5b", "flux", "pixart-sigma")
ON_CPU = {"layers": 2, "heads": 2, "tokens": 4096}  # what a CPU gets unless told otherwise
DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
METHODS = ("block-sparse", "rectified-spaattn", "re-ttention")
_NOT_HERE = ("shape", "seq", "dim", "block", "density", "backend", "plot", "inputs")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``bench model``."""
    group = parser.add_argument_group(
        "model",
        "One step of a transformer at its real size, dense and with every --method. Weights are random: latency does "
        "not depend on them, except for methods that choose how much to read by the data (top_p). On a CPU the model "
        "is scaled down (2 layers, 2 heads, 4096 tokens) unless --full or sizes are given. --heads and --batch count "
        "here too.",
    )
    group.add_argument("--config", metavar="NAME", help=", ".join(CONFIGS))
    group.add_argument("--random-weights", action="store_true", help="said for clarity: there are no others here")
    group.add_argument(
        "--method",
        action="append",
        metavar="NAME[:KEY=VALUE,...]",
        help="competitor, with settings on top of the model's preset; repeatable (default: the three readers)",
    )
    group.add_argument("--preset", metavar="NAME", help="settings of methods: auto (default), none, or a preset's name")
    group.add_argument("--layers", type=int, metavar="N", help="layers, if not the real number")
    group.add_argument("--tokens", type=int, metavar="N", help="visual tokens, at least: scales the picture")
    group.add_argument("--height", type=int, metavar="PX", help="pixels (default: the model's own)")
    group.add_argument("--width", type=int, metavar="PX", help="pixels (default: the model's own)")
    group.add_argument("--frames", type=int, metavar="N", help="frames of a clip (default: the model's own)")
    group.add_argument("--full", action="store_true", help="the real size on a CPU too")


def run(args: argparse.Namespace) -> int:
    """Measure and print. Returns 0.

    Raises:
        DitAttnError: an unknown configuration or method, a size out of range, a method the model cannot take, a device
            that is not there, too little memory, a file that cannot be written.
    """
    import torch

    from dit_attn.cli import load_pipeline, outputs
    from dit_attn.models import architectures
    from dit_attn.models.evaluate import current_commit
    from dit_attn.models.export import environment
    from dit_attn.pipelines.benchmark import model_step

    _check(args)
    published = architectures.architecture(args.config)
    device = load_pipeline.pick_device(args.device)
    arch = _scaled(published, args, device.type)
    dtype = getattr(torch, args.dtype[0] if args.dtype else "bfloat16" if device.type == "cuda" else "float32")
    competitors = _competitors(args.method or METHODS, arch, args.preset)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.output:
        outputs.prepare_folder(Path(args.output).expanduser().parent)
    arch.check_memory(device, dtype, args.batch, _kept(competitors, arch, dtype.itemsize, args.batch))
    load_pipeline.quiet(show_progress=False)
    before = _load()
    model = arch.build(device, dtype)
    progress = _progress(args.json)
    found = model_step.measure(
        model, arch.call(device, dtype, args.batch), competitors, args.repeats, device, progress
    )
    progress("")
    record = {
        "what": "one denoising step of a transformer, dense and with methods in turns; medians; ratios are to the "
        "dense step of the same round and hold for this machine only",
        "note": model_step.NOTE,
        "command": _command(args),
        "commit": current_commit(),
        "environment": environment(),
        "load_average": {"before": before, "after": _load(), "cores": os.cpu_count()},
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "model": _about(arch, published, model),
        "batch": args.batch,
        "repeats": args.repeats,
        "target": "an attention call, choosing counted, at least 0.6 / executed density faster than dense",
        **found,
    }
    if args.output:
        outputs.write_json(record, Path(args.output).expanduser())
    print(json.dumps(record, indent=1) if args.json else table(record))
    return 0


def _check(args: argparse.Namespace) -> None:
    if args.config is None:
        raise DitAttnError(f"bench model needs --config; one of: {', '.join(CONFIGS)}")
    if args.config not in CONFIGS:
        raise unknown("--config", args.config, CONFIGS)
    for name in ("layers", "heads", "tokens", "height", "width", "frames", "batch", "repeats", "threads"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise DitAttnError(f"--{name} must be at least 1, got {value}")
    for name in _NOT_HERE:
        if getattr(args, name) is not None:
            remedy = "write it as a setting, --method NAME:density=0.25" if name == "density" else "leave it out"
            raise DitAttnError(f"--{name} is not for bench model; {remedy}")
    if args.tokens and (args.height or args.width):
        raise DitAttnError("--tokens and --height or --width say the same twice; give one of them")
    if args.dtype and (len(args.dtype) > 1 or args.dtype[0] not in DTYPES):
        raise DitAttnError(f"--dtype {' '.join(args.dtype)}: bench model takes one of {', '.join(DTYPES)}")


def _scaled(arch: Architecture, args: argparse.Namespace, device: str) -> Architecture:
    """The architecture at the size that was asked for, or that a CPU can carry."""
    small = device != "cuda" and not args.full
    sizes = {name: getattr(args, name) or (default if small else None) for name, default in ON_CPU.items()}
    arch = arch.at(args.frames, args.height, args.width).sized(sizes["layers"], sizes["heads"])
    if sizes["tokens"] and not (args.height or args.width):
        arch = arch.with_tokens(sizes["tokens"])
    return arch


def _competitors(texts: list[str] | tuple[str, ...], arch: Architecture, preset: str | None) -> list[Competitor]:
    """The methods with the settings of the real model's preset; its dense layers are meant for the real depth."""
    from dit_attn.cli import method_options
    from dit_attn.cli.commands.compare.command import split_method
    from dit_attn.pipelines.benchmark import model_step

    found: dict[str, Competitor] = {}
    for text in texts:
        label = " ".join(text.split())
        if label in found:
            raise DitAttnError(f"--method {label} is given twice; once is enough")
        wanted = split_method(text)
        chosen = method_options.resolve(wanted, arch.stand_in, preset)
        if "layers" in arch.scaled:
            chosen = tuple(_every_layer(item, method) for item, method in zip(wanted, chosen))
        found[label] = model_step.competitor(label, chosen)
    return list(found.values())


def _kept(competitors: list[Competitor], arch: Architecture, element: int, batch: int) -> int:
    """Bytes that the most demanding method keeps on the device from a refresh to the next."""
    from dit_attn.processors.methods.re_ttention import ReTtention

    methods = [one.method for one in competitors]
    each = [
        method.cache_bytes(math.prod(arch.grid), arch.heads, arch.head_dim, element)
        for method in methods
        if isinstance(method, ReTtention) and not method.offload
    ]
    return batch * arch.layers * max(each, default=0)


def _every_layer(wanted: Wanted, method: Method) -> Method:
    """The method without the dense layers of a preset; those the user names stay."""
    from dit_attn.processors.methods.sparse import SparseMethod

    if not isinstance(method, SparseMethod) or "dense_layers" in wanted.settings:
        return method
    return dataclasses.replace(method, dense_layers=())


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


def _command(args: argparse.Namespace) -> str:
    """The command that repeats the measurement, without paths of this machine."""
    words: list[Any] = ["dit-attn bench model --config", args.config, "--random-weights"]
    for text in args.method or ():
        words += ["--method", f'"{text}"' if " " in text else text]
    for name in ("preset", "layers", "heads", "tokens", "height", "width", "frames", "threads"):
        value = getattr(args, name)
        words += [f"--{name}", value] if value is not None else []
    words += ["--full"] if args.full else []
    words += ["--dtype", *args.dtype] if args.dtype else []
    words += ["--batch", args.batch, "--repeats", args.repeats, "--device", args.device]
    return " ".join(map(str, words))


def _progress(quiet: bool) -> Any:
    """One line on standard error that is written over, for people who watch."""
    if quiet or not sys.stderr.isatty():
        return lambda text: None
    return lambda text: print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def _load() -> list[float] | None:
    return [round(value, 2) for value in os.getloadavg()] if hasattr(os, "getloadavg") else None


def table(record: dict[str, Any]) -> str:
    """The record as text."""
    model, dense, place = record["model"], record["dense"], record["environment"]
    pixels = model["pixels"]
    size = "real size" if model["real_size"] else "scaled"
    lines = [
        f"{model['config']} ({size}): {model['layers']} layers, {model['heads']} heads of {model['head_dim']}, "
        f"{model['parameters'] / 1e6:,.0f} million random weights, {pixels['frames']} x {pixels['height']} x "
        f"{pixels['width']} = {model['visual_tokens']:,} tokens and {model['text_tokens']} of text",
        f"{record['device']}, {record['dtype']}: {place['hardware']}, {place['threads']} threads, torch "
        f"{place['torch']}; {record['repeats']} rounds in turns, medians; load {record['load_average']['before']}",
        f"dense step {dense['seconds']['median']:.3f} s [{dense['seconds']['min']:.3f}, "
        f"{dense['seconds']['max']:.3f}], attention {100 * dense['attention_share']:.1f} % of it "
        f"({dense['attention_calls']} calls of {dense['attention_ms']['median']:.1f} ms), {_memory(dense)}",
        f"{'':<36}{'step':<17}{'time':>9}{'ratio':>7}{'':>14}{'of CPU':>8}{'ceiling':>9}{'density':>9}{'memory':>10}"
        f"{'attention':>11}{'of CPU':>9}{'choosing':>10}{'target':>9}",
    ]
    lines += [_line(row) for row in record["rows"]]
    lines += [
        f"{row['label']}, {row['phase']}: {count} of {row['calls']} calls stayed dense: {reason}"
        for row in record["rows"]
        for reason, count in row["fallbacks"].items()
    ]
    lines += [f"ratio: to the dense step; target: {record['target']}", f"memory: {record['memory']}", record["note"]]
    return "\n".join(lines)


def _line(row: dict[str, Any]) -> str:
    ratio, attention = row["ratio"], row["attention"]
    ends = f"[{ratio['min']:.2f}, {ratio['max']:.2f}]"
    text = (
        f"{row['label']:<36}{row['phase']:<17}{row['seconds']['median']:>7.3f} s{ratio['median']:>7.2f}{ends:>14}"
        f"{_cpu(row, 'ratio_cpu'):>8}{row['ceiling']:>8.2f}x{row['step_density']:>9.3f}{_memory(row):>10}"
    )
    if attention is None:
        return text
    text += f"{attention['speedup']:>10.2f}x{_cpu(attention, 'speedup_cpu'):>9}{100 * attention['plan_share']:>8.1f} %"
    if attention["target"] is None:
        return text
    return text + f"{attention['target']:>8.2f}x {'pass' if attention['met'] else 'FAIL'}"


def _cpu(row: dict[str, Any], name: str) -> str:
    value = row[name]
    return "-" if value is None else f"{value['median'] if isinstance(value, dict) else value:.2f}"


def _memory(row: dict[str, Any]) -> str:
    return "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**30:.2f} GiB"
