"""``dit-attn bench``: how fast kernels and methods are on this machine, next to the dense calls they replace."""

from __future__ import annotations

import argparse
import importlib

from dit_attn.cli import options as flags
from dit_attn.cli import parser as parsers
from dit_attn.cli.commands.bench import early
from dit_attn.cli.progress import loading_libraries
from dit_attn.errors import DitAttnError, unknown

DTYPES = ("float32", "bfloat16", "float16")
GROUPS = {
    "what": (
        flags.Flag("what", "kernels, windows, operators, model or capture", default="required", metavar="WHAT",
                   positional=True),
    ),
    "kernels": (
        flags.Flag("shape", "tokens, heads and head size of a layer of a known model"),
        flags.Flag("seq", "tokens", int, "4096", low=1, metavar="S"),
        flags.Flag("heads", "heads; of bench model too", int, "4", low=1, metavar="H"),
        flags.Flag("dim", "size of a head", int, "128", low=1, metavar="D"),
        flags.Flag("block", "tokens per block; of bench operators too", int, "128", low=1),
        flags.Flag("density", "parts of the key blocks computed; of bench operators too", float,
                   "0.5 0.25 0.125 0.0625", nargs="+", metavar="P"),
        flags.Flag("backend", "kernel of the sparse calls", default="by capability"),
        flags.Flag("against", "other kernels: flex, flashinfer, ...", nargs="+"),
        flags.Flag("inputs", "random: noise, random blocks; structured: smooth fields, blocks by their scores, rows of "
                   "different counts; or a file of bench capture", default="random", metavar="KIND"),
        flags.Flag("sharpness", "spread of the logits", float, "1"),
        flags.Flag("save", "measure a fixed grid of sizes, in a minute or two, and store it for the method auto", bool),
    ),
    "operators": (
        flags.Flag("source", "synthetic, wan2.1-1.3b (two blocks with random weights) or an embedded model; of bench "
                   "capture too, which takes any model", default="tiny-image"),
        flags.Flag("prompts", "held-out prompts, or seeds", int, "6", low=1),
        flags.Flag("steps", "denoising steps of a run; of bench capture too", int, "the model's; of random numbers: 8",
                   low=1),
        flags.Flag("every", "measure one step of N", int, "5", low=1),
        flags.Flag("grid", "T H W tokens of synthetic and wan2.1-1.3b", int, "16 16 16", nargs=3),
        flags.Flag("family", "only these rows of the table", default="all, or none with --method", nargs="+"),
    ),
    "model": (
        flags.Flag("config", f"the transformer: {', '.join(early.CONFIGS)}", default="none; model needs it"),
        flags.Flag("random-weights", "given for clarity: there are no others here", bool, "on"),
        flags.Flag("layers", "layers", int, "2 on a CPU, else the real number", low=1),
        flags.Flag("tokens", "visual tokens, at least: scales the image", int, "4096 on a CPU, else the real number",
                   low=1),
        flags.Flag("height", "height in pixels; of bench operators and capture too", int, "the model's", low=1,
                   metavar="PX"),
        flags.Flag("width", "width in pixels; of bench operators and capture too", int, "the model's", low=1,
                   metavar="PX"),
        flags.Flag("frames", "frames of a video; of bench capture too", int, "the model's", low=1),
        flags.Flag("full", "the real size on a CPU too", bool),
    ),
    "methods": flags.PRESET,
    "output": (
        flags.Flag("output", "write the JSON here; of bench capture: the .safetensors file", short=("-o",),
                   metavar="FILE"),
        flags.Flag("plot", "draw speed-up against density here (.png or .svg)", metavar="FILE"),
        flags.Flag("json", "print JSON instead of a table", bool),
        flags.Flag("verbose", "also print targets, and processor times of bench model", bool),
    ),
    "run": (
        flags.DEVICE,
        flags.Flag("dtype", "types; model takes one", default="float32 bfloat16; model: by device",
                   choices=DTYPES, nargs="+", metavar="TYPE"),
        flags.Flag("batch", "batch", int, "1", low=1),
        flags.Flag("repeats", "rounds", int, "9", low=1),
        flags.Flag("threads", "CPU threads", int, "torch's own choice", low=1),
    ),
}  # fmt: skip
_ABOUT = {
    "kernels": "Block-sparse attention next to torch's dense attention, taking turns in one run.",
    "operators": "The error of every way to select blocks and to compensate, on the calls of dense runs.",
    "model": "One step of a transformer at its real size, dense and with every --method. Weights are random: latency "
    "does not depend on them, except for methods that choose how many keys to attend to by the data (top_p). On a CPU "
    "the model is scaled down (2 layers, 2 heads, 4096 tokens) unless --full or sizes are given.",
}
_METHOD = f"{parsers.VARIANTS} (default: model: the three sparse methods; operators: the table's rows)"
_EXAMPLES = """examples:
  dit-attn bench kernels --shape wan2.1-1.3b --dtype bfloat16 --plot speed.png
  dit-attn bench kernels --save
  dit-attn bench windows --threads 2
  dit-attn bench operators --source tiny-image --method block-sparse
  dit-attn bench model --config wan2.1-1.3b --method block-sparse:density=0.2
  dit-attn bench capture --source tiny-video --output call.safetensors
"""
_SHARED = ("what", "output", "json", "device", "threads")
# What each of them takes in addition.
JOBS = {
    "kernels": ("shape", "seq", "heads", "dim", "block", "density", "backend", "against", "inputs", "sharpness", "plot",
                "dtype", "batch", "repeats", "save"),
    "operators": ("block", "density", "source", "prompts", "steps", "every", "grid", "height", "width", "family",
                  "verbose", "words"),
    "model": ("heads", "config", "random_weights", "layers", "tokens", "height", "width", "frames", "full", "preset",
              "dtype", "batch", "repeats", "verbose", "words"),
    "windows": ("heads", "dim", "batch", "repeats"),
    "capture": ("source", "steps", "height", "width", "frames", "dtype"),
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``bench``."""
    parsers.describe(
        parser,
        "bench WHAT [options]",
        "Measure kernels, operators or a model's step, or capture an attention call to measure kernels on. Figures are "
        "for this machine and these sizes; on a busy machine they mean little.",
        _EXAMPLES,
    )
    parsers.add_groups(parser, GROUPS, _METHOD, _ABOUT)


def run(args: argparse.Namespace) -> int:
    """Measure and print. Returns 0.

    Raises:
        DitAttnError: a flag of something else, a size out of range, a device that is not there, a file that cannot be
            written.
    """
    options = flags.merge(args, GROUPS)
    what = options["what"]
    if what not in JOBS:
        raise unknown("measurement", what, JOBS)
    given = [*options.values, *(["words"] if options.words else [])]
    for name in given:
        if name not in (*_SHARED, *JOBS[what]):
            flag = "method" if name == "words" else name.replace("_", "-")
            settings = (what, name) == ("model", "density")
            remedy = "write it as a setting, --method NAME:density=0.25" if settings else "leave it out"
            raise DitAttnError(f"--{flag} is not for bench {what}; {remedy}")
    early.check(options)
    with loading_libraries(not options.get("json")):
        module = importlib.import_module(f"dit_attn.cli.commands.bench.{what}")
    return int(module.run(options))
