"""``dit-attn bench capture``: keep one attention call of a trained model, to measure kernels on it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from dit_attn.errors import DitAttnError

SIZES = {"height": "height", "width": "width", "frames": "num_frames", "steps": "num_inference_steps"}
_NOT_HERE = ("shape", "seq", "heads", "dim", "block", "density", "backend", "plot", "inputs", "config", "method")


def run(args: argparse.Namespace) -> int:
    """Run a pipeline and write q, k and v of its middle layer at its middle step. Returns 0.

    Raises:
        DitAttnError: an unknown model, a size out of range, a run without such a call, a file that cannot be written.
    """
    from safetensors.torch import save_file

    from dit_attn.cli import load_pipeline, model_source, outputs
    from dit_attn.eval.shapes_world import world
    from dit_attn.models.evaluate import current_commit
    from dit_attn.models.export import environment
    from dit_attn.pipelines.inspect.capture import captured

    path = _check(args)
    model = model_source.describe(args.source)
    device = load_pipeline.pick_device(args.device)
    outputs.prepare_folder(path.parent)
    load_pipeline.quiet(show_progress=False)
    dtype = load_pipeline.pick_dtype(args.dtype[0] if args.dtype else "auto", model, device)
    pipe = load_pipeline.load_pipeline(model, {}, device, dtype)
    call = {**model.defaults, **{key: getattr(args, name) for name, key in SIZES.items() if getattr(args, name)}}
    kind = "video" if "num_frames" in call else "image"
    held, where = captured(pipe, world.caption(world.held_out_sample(kind, 1)[0]), call=call)
    shape = tuple(held["q"].shape)
    about: dict[str, Any] = {
        "command": _command(args), "commit": current_commit(), "model": args.source, "call": call, **where,
        "shape": shape, "environment": environment(),
    }  # fmt: skip
    held = {name: x.cpu().contiguous() for name, x in held.items()}
    with outputs.output_file(path) as temporary:
        save_file(held, temporary, {"about": json.dumps(about, default=str)})
    text = f"{path.name}: q, k, v {shape} of layer {where['layer']} of {where['layers']}, step {where['step']} of "
    print(json.dumps(about, default=str) if args.json else f"{text}{where['steps']}")
    return 0


def _check(args: argparse.Namespace) -> Path:
    if args.output is None or not args.output.endswith(".safetensors"):
        raise DitAttnError("bench capture needs --output FILE.safetensors: where q, k and v shall be kept")
    for name in (*SIZES, "layers", "threads"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise DitAttnError(f"--{name} must be at least 1, got {value}")
    for name in _NOT_HERE:
        if getattr(args, name) is not None:
            raise DitAttnError(f"--{name} is not for bench capture; leave it out")
    return Path(args.output).expanduser()


def _command(args: argparse.Namespace) -> str:
    """The command that repeats it, without paths of this machine."""
    name = Path(args.source).name if Path(args.source).exists() else args.source
    words: list[Any] = ["dit-attn bench capture --source", name]
    for name in SIZES:
        words += [f"--{name}", getattr(args, name)] if getattr(args, name) else []
    return " ".join(map(str, [*words, "--output", Path(args.output).name]))
