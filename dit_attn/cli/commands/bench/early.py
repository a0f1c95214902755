"""What ``dit-attn bench`` can refuse before torch is imported."""

from __future__ import annotations

import math
from pathlib import Path

from dit_attn.cli.commands.bench import plot
from dit_attn.cli.early_check import check_early
from dit_attn.cli.model_source import check_reachable, locate
from dit_attn.cli.options import Options
from dit_attn.cli.source_index import constant
from dit_attn.errors import DitAttnError, unknown

CONFIGS = (
    *("wan2.1-1.3b", "wan2.1-14b", "hunyuan-video", "cogvideox-5b", "flux", "pixart-sigma"),
    *("ltx-video", "qwen-image-2.1", "krea-2", "minimax-h3", "cosmos-3"),
)
MADE = ("synthetic", "wan2.1-1.3b")  # of random numbers, on a grid
SOURCES = (*MADE, "tiny-image", "tiny-joint", "tiny-multi", "tiny-video")
RECORDED = ".safetensors"
_PIXELS = 16  # the sizes of embedded models are multiples of it
_SAVED = ("what", "save", "device", "threads", "json")  # what bench kernels --save takes


def check(options: Options) -> None:
    """Check the flags of what is measured as far as that goes without torch.

    Raises:
        DitAttnError: bad input.
    """
    check_early(options)
    _CHECKS[options["what"]](options)


def _kernels(options: Options) -> None:
    if options.get("save"):
        for name in options.values:
            if name not in _SAVED:
                raise DitAttnError(f"--{name} is not for --save, which measures a grid of its own; leave it out")
    kind = options.get("inputs", "random")
    kinds = constant("dit_attn.kernels.benchmark.inputs", "KINDS")
    if kind.endswith(RECORDED):
        for name in ("shape", "seq", "heads", "dim", "batch"):
            if name in options:
                raise DitAttnError(f"--{name} is not for recorded --inputs, which have their own size; leave it out")
        if not Path(kind).expanduser().is_file():
            raise DitAttnError(f"cannot read {kind}: there is no such file; make one with `dit-attn bench capture`")
    elif kind not in kinds:
        raise DitAttnError(f"--inputs is random, structured or a {RECORDED} file of bench capture, got {kind}")
    shapes = constant("dit_attn.kernels.benchmark.measure", "SHAPES")
    if options.get("shape") is not None and options["shape"] not in shapes:
        raise unknown("--shape", options["shape"], shapes)
    if not options.get("sharpness", 1.0) > 0.0:
        raise DitAttnError(f"--sharpness must be above 0, got {options['sharpness']}: it is the spread of the logits")
    for value in options.get("density", ()):
        if not 0.0 < value <= 1.0:
            raise DitAttnError(
                f"--density must be above 0 and at most 1, got {value}: it is the part of blocks computed"
            )
    if options.get("plot"):
        plot.check(Path(options["plot"]))


def _operators(options: Options) -> None:
    source = options.get("source", "tiny-image")
    if source not in SOURCES:
        raise unknown("--source", source, SOURCES)
    if source in MADE and options.get("device", "cpu") not in ("auto", "cpu"):
        raise DitAttnError(f"--device: the calls of {source} are made on CPUs; leave it out")
    if source not in MADE and "grid" in options:
        raise DitAttnError(f"--grid is for --source {' and '.join(MADE)}; {source} takes --height and --width")
    for name in ("height", "width"):
        if name in options and source in MADE:
            raise DitAttnError(f"--{name} is not for --source {source}, whose size is --grid; leave it out")
        if options.get(name, _PIXELS) % _PIXELS:
            raise DitAttnError(f"--{name} must be a multiple of {_PIXELS} pixels, got {options[name]}")
    grid = options.get("grid", (16, 16, 16))
    if min(grid) < 1 or math.prod(grid) < 256:
        raise DitAttnError(f"--grid must be three positive sizes with at least 256 tokens, got {tuple(grid)}")
    for value in options.get("density", ()):
        if not 0.0 < value < 1.0:
            raise DitAttnError(f"--density must be above 0 and below 1, got {value}: at 1 every method is dense")
    block = options.get("block", 64)
    if not 8 <= block <= 1024:
        raise DitAttnError(f"--block must be from 8 to 1024 tokens, got {block}")


def _model(options: Options) -> None:
    if "config" not in options:
        raise DitAttnError(f"bench model needs --config; one of: {', '.join(CONFIGS)}")
    if options["config"] not in CONFIGS:
        raise unknown("--config", options["config"], CONFIGS)
    if "tokens" in options and ("height" in options or "width" in options):
        raise DitAttnError("--tokens and --height or --width say the same twice; give one of them")
    types = options.get("dtype", [])
    if len(types) > 1:
        raise DitAttnError(f"--dtype {' '.join(types)}: bench model takes one of float32, bfloat16, float16")


def _windows(options: Options) -> None:
    if options.get("device", "cpu") not in ("auto", "cpu"):
        raise DitAttnError("bench windows measures CPUs; leave out --device")


def _capture(options: Options) -> None:
    if not options.get("output", "").endswith(RECORDED):
        raise DitAttnError("bench capture needs --output FILE.safetensors: where q, k and v shall be saved")
    kind, path, _ = locate(options.get("source", "tiny-image"))
    if kind == "hub":
        check_reachable(path)


_CHECKS = {
    "kernels": _kernels, "operators": _operators, "model": _model, "windows": _windows, "capture": _capture,
}  # fmt: skip
