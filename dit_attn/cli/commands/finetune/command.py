"""``dit-attn finetune``: train a model with a sparse method in it, or carry such a training over to a sibling model."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace

from dit_attn.cli import options as flags
from dit_attn.cli import parser as parsers
from dit_attn.cli.commands.finetune import early
from dit_attn.cli.progress import loading_libraries
from dit_attn.cli.source_index import constant
from dit_attn.cli.table import fields, show
from dit_attn.cli.workers import refuse_several
from dit_attn.errors import unknown

JOBS = ("sla", "moh", "merge")
_MODEL = replace(flags.MODEL[0], default="none; --tiny: tiny-video")
_STAGES = constant("dit_attn.pipelines.finetune.config", "STAGES")
_LOSSES = constant("dit_attn.pipelines.finetune.config", "LOSSES")
GROUPS = {
    "what": (
        flags.Flag("what", "sla (or another sparse method, with --method), moh, or merge", default="required",
                   metavar="WHAT", positional=True),
    ),
    "model": (_MODEL, *flags.MODEL[1:], *flags.without(flags.WEIGHTS, "lora")),
    "methods": flags.PRESET,
    "examples": (
        flags.Flag("data", "folder of examples", default="drawn by the dense model", metavar="DIR", exists=True),
        *flags.only(flags.PROMPT, "prompt", "prompts"),
        flags.Flag("runs", "runs of the dense model to draw examples from", int, "one per prompt; captions: 64", low=1),
        flags.Flag("calls-per-run", "examples of each run", int, "4", low=1),
        *flags.SIZE, *flags.only(flags.SAMPLING, "steps", "guidance-scale"),
    ),
    "training": (
        flags.Flag("stage", "what is trained: the tensors of the method, all, or adapters", default="full",
                   choices=_STAGES),
        flags.Flag("loss", "distance to the dense model, or the model's own loss", default="teacher", choices=_LOSSES),
        flags.Flag("train-steps", "optimizer steps", int, "2000", low=1),
        flags.Flag("batch", "examples of a step", int, "4", low=1),
        flags.Flag("lr", "learning rate", float, "1e-5", low=0.0),
        flags.Flag("warmup", "steps over which it rises from 0", int, "0", low=0),
        flags.Flag("densities", "densities for equal parts of the training, e.g. 0.3,0.1,0.05",
                   default="that of the method", metavar="X,X"),
        flags.Flag("ema", "decay of the moving average that is saved", float, "0, the last weights", low=0.0, high=1.0),
        flags.Flag("rank", "of the adapters of stage lora", int, "16", low=1),
        flags.Flag("mixed-precision", "type that is computed in, under autocast", choices=("bf16",)),
        flags.Flag("gradient-checkpointing", "compute activations twice instead of storing them", bool),
        flags.Flag("fsdp", "split the model over the processes of the launch (FSDP 2)", bool),
        flags.Flag("log-every", "steps between measurements of the loss", int, "50", low=1),
        flags.Flag("checkpoint-every", "steps between checkpoints", int, "500", low=1),
        flags.Flag("seed", "seed of the order of the examples, and of the runs that draw them", int, "0", low=0),
    ),
    "merge": (
        flags.Flag("base", "transformer folder that the training began from", metavar="DIR", exists=True),
        flags.Flag("tuned", "transformer folder that it ended in", metavar="DIR", exists=True),
        flags.Flag("target", "transformer folder of the sibling model", metavar="DIR", exists=True),
    ),
    "output": (flags.Flag("output", "folder of the run", default="outputs/finetune-MODEL", short=("-o",),
                          metavar="DIR"),),
    "run": (
        flags.DEVICE,
        flags.Flag("threads", "CPU threads of torch", int, "torch's own choice", low=1),
        flags.Flag("resume", "continue from the checkpoint in --output", bool),
        flags.Flag("tiny", "try everything out: a small model, a few examples and steps", bool),
    ),
    "workers": flags.WORKERS,
}  # fmt: skip
_TRAINING = ("model", "methods", "examples", "training", "run")
_METHOD = "the sparse method, with its settings, e.g. block-sparse:density=0.1 (default: sla, or moh)"
_EXAMPLES = """examples:
  dit-attn finetune sla --tiny
  dit-attn finetune sla --model tiny-video --method sla:density=0.1 \\
      --train-steps 300 --batch 2 --lr 1e-4 --output outputs/sla
  dit-attn generate --model outputs/sla/pipeline --method outputs/sla/method \\
      --prompt "a large purple circle moving left fast on black"
  dit-attn finetune merge --base Wan-1.3B/transformer \\
      --tuned outputs/sla/pipeline/transformer \\
      --target Wan-1.3B-distilled/transformer --output outputs/merged
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``finetune``."""
    parsers.describe(
        parser,
        "finetune WHAT [options]",
        "Train a transformer with a sparse method in it, towards what the dense model predicts, and write the result "
        "as folders that --model and --method take. The run can be stopped at any moment and resumed. merge adds what "
        "a training changed to a sibling of the model.",
        _EXAMPLES,
    )
    parsers.add_groups(parser, GROUPS, _METHOD)


def run(args: argparse.Namespace) -> int:
    """Check everything, load once, draw examples, train, and write the result.

    Returns:
        0, 1 where workers failed, or 130 after Ctrl-C.

    Raises:
        DitAttnError: bad input, before anything is loaded where that can be known.
    """
    options = flags.merge(args, GROUPS)
    what = options["what"]
    if what not in JOBS:
        raise unknown("fine-tuning", what, JOBS)
    if what == "merge":
        return 2 if refuse_several("finetune merge") else _merge(options)
    if options.get("tiny") and "model" not in options:
        options.values["model"] = early.TINY
    early.check(options)
    with loading_libraries():
        from dit_attn.cli.commands.finetune import run as finetune_run

    return finetune_run.run(options)


def _merge(options: flags.Options) -> int:
    early.check_merge(options)
    with loading_libraries():
        from dit_attn.pipelines.finetune.merge import merge_weights
    output = options.get("output", "outputs/merged")
    found = merge_weights(options["base"], options["tuned"], options["target"], output)
    show(fields({"tensors": f"{found['changed']} of {found['tensors']} changed", "saved": output}))
    if not found["changed"]:
        print("nothing was changed: --base and --tuned are the same weights", file=sys.stderr)
    return 0
