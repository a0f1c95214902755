"""``dit-attn bench capture``: save one attention call of a trained model, to measure kernels on it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from dit_attn.cli import load_pipeline, model_source, outputs
from dit_attn.cli.captions import held_out_captions
from dit_attn.cli.load_pipeline import LoadConfig
from dit_attn.cli.options import Options
from dit_attn.models.evaluate import current_commit
from dit_attn.models.export import environment
from dit_attn.pipelines.inspect.capture import capture_call

SIZES = {"height": "height", "width": "width", "frames": "num_frames", "steps": "num_inference_steps"}


@dataclass(frozen=True)
class CaptureConfig:
    """One capture, checked; no weights are loaded.

    Attributes:
        load: the pipeline.
        sizes: the flags of sizes and steps that were given.
        output: the file.
        threads: of torch; ``None`` leaves them.
        json: print JSON.
    """

    load: LoadConfig
    sizes: dict[str, int]
    output: Path
    threads: int | None = None
    json: bool = False

    @classmethod
    def from_options(cls, options: Options) -> CaptureConfig:
        """Read the flags, which :mod:`~dit_attn.cli.commands.bench.early` has checked.

        Raises:
            DitAttnError: an unknown model, a device that is not there.
        """
        source = model_source.describe(options.get("source", "tiny-image"))
        device = load_pipeline.pick_device(options.get("device", "auto"))
        dtype = load_pipeline.pick_dtype(options.get("dtype", ["auto"])[0], source, device)
        load = LoadConfig(source, device, dtype)
        return cls(load, options.pick(*SIZES), Path(options["output"]).expanduser(), **options.pick("threads", "json"))


def run(options: Options) -> int:
    """Run a pipeline and write q, k and v of its middle layer at its middle step. Returns 0.

    Raises:
        DitAttnError: bad input, a run without such a call, a file that cannot be written.
    """
    config = CaptureConfig.from_options(options)
    source, path = config.load.source, config.output
    outputs.prepare_folder(path.parent)
    if config.threads:
        torch.set_num_threads(config.threads)
    load_pipeline.quiet(show_progress=False)
    pipe = load_pipeline.load_pipeline(config.load)
    call = {**source.defaults, **{SIZES[name]: value for name, value in config.sizes.items()}}
    tensors, where = capture_call(pipe, held_out_captions(call, 1)[0], call=call)
    shape = tuple(tensors["q"].shape)
    about: dict[str, Any] = {
        "command": _command(config), "commit": current_commit(), "model": source.name, "call": call, **where,
        "shape": shape, "environment": environment(),
    }  # fmt: skip
    tensors = {name: x.cpu().contiguous() for name, x in tensors.items()}
    with outputs.output_file(path) as temporary:
        save_file(tensors, temporary, {"about": json.dumps(about, default=str)})
    text = f"{path.name}: q, k, v {shape} of layer {where['layer']} of {where['layers']}, step {where['step']} of "
    print(json.dumps(about, default=str) if config.json else f"{text}{where['steps']}")
    return 0


def _command(config: CaptureConfig) -> str:
    """The command that repeats it, without paths of this machine."""
    name = config.load.source.name
    words: list[Any] = ["dit-attn bench capture --source", Path(name).name if Path(name).exists() else name]
    for flag, value in config.sizes.items():
        words += [f"--{flag}", value]
    return " ".join(map(str, [*words, "--output", config.output.name]))
