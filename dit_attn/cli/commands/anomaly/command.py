"""``dit-attn anomaly``: learn defects from a few shots, make image-mask pairs, measure what they are worth."""

from __future__ import annotations

import argparse

from dit_attn.cli import engines
from dit_attn.cli import options as flags
from dit_attn.cli import parser as parsers
from dit_attn.cli.workers import refuse_several
from dit_attn.errors import DitAttnError, unknown

JOBS = ("train", "generate", "benchmark")
UNDIVIDED = {  # why a job cannot be done in parts that know nothing of each other
    "generate": "a pair that is rejected is made again in a batch with those that other parts have rejected",
    "benchmark": "the verdicts are of the measurements of all seeds",
}
GROUPS = {
    "job": (flags.Flag("job", "train, generate or benchmark", default="required", metavar="JOB", positional=True),),
    "model": (*flags.MODEL, *flags.only(flags.WEIGHTS, "dtype"),
              flags.Flag("resolution", "pixels along a side at which the model works", int, "the model's", low=16)),
    "data": (
        flags.Flag("normal", "folder of normal images", metavar="DIR", exists=True),
        flags.Flag("defects", "folder of defect images; subfolders are types", metavar="DIR", exists=True),
        flags.Flag("masks", "folder of masks or labelme files, or a CSV file of boxes; of generate: masks to paint in",
                   metavar="PATH", exists=True),
        flags.Flag("data", "instead: a tree laid out as MVTec AD, VisA or anomalib's Folder", metavar="DIR",
                   exists=True),
        flags.Flag("product", "name of the product; of trees: repeatable, which ones", default="product; all",
                   many=True),
        flags.Flag("defect", "name of the defect; of trees: repeatable, which ones", default="defect; all", many=True),
        flags.Flag("shots", "defect images to learn from, per type of a tree", int, "a third of them", low=1),
        flags.Flag("licence", "licence of the images, for the concept and the manifests"),
    ),
    "training": (
        flags.Flag("train-steps", "optimizer steps", int, "200", low=1),
        flags.Flag("train-batch", "samples per step", int, "4", low=1),
        flags.Flag("tokens", "vectors of a defect's appearance", int, "8", low=1),
        flags.Flag("mask-tokens", "vectors of a mask; 0 for none", int, "4", low=0),
        flags.Flag("lora-rank", "rank of the LoRA; 0 for none", int, "8", low=0),
        flags.Flag("gradient-checkpointing", "compute activations twice instead of storing them: less memory", bool),
        flags.Flag("flips", "mirror shots: both, horizontal or none", default="both",
                   choices=("both", "horizontal", "none"), metavar="HOW"),
        flags.Flag("prompt-template", "prompt of a defect", default="{product} with a {defect}", metavar="TEXT"),
        flags.Flag("normal-template", "prompt of a normal product", default="normal {product}", metavar="TEXT"),
        flags.Flag("learn-masks", "learn to draw masks too, for --mask-source learned", bool),
        flags.Flag("mask-steps", "optimizer steps of --learn-masks", int, "600", low=1),
        flags.Flag("push-to-hub", "upload the concept to this repository of the Hugging Face Hub", metavar="ORG/NAME"),
    ),
    "generation": (
        flags.Flag("concept", "file that anomaly train wrote", metavar="FILE", exists=True),
        flags.Flag("count", "pairs in all, shared out evenly", int, low=1),
        flags.Flag("per-defect", "pairs of every (product, defect)", int, low=1),
        flags.Flag("mask-source", "real (of the shots, moved and bent), drawn (new ones of such a size), learned (see "
                   "--learn-masks), or given by --masks", default="real", choices=("real", "drawn", "learned", "given"),
                   metavar="KIND"),
        flags.Flag("roi", "where defects may lie: auto (the foreground), none, an image, or a folder of images",
                   default="auto", metavar="PATH"),
        flags.Flag("steps", "denoising steps", int, "20", low=1),
        flags.Flag("guidance-scale", "guidance against the normal product", float, "2", low=0.0),
        flags.Flag("batch", "images at once", int, "8", low=1),
        flags.Flag("retries", "new attempts after a rejection", int, "3", low=0),
        flags.Flag("controls", "normal controls to score per defect, for the report", int, "4", low=0),
        flags.Flag("crop", "auto: crop around the mask and paste; none: the entire image", default="auto",
                   choices=("auto", "none"), metavar="HOW"),
        flags.Flag("reweighting", "attend more to the defect where a mask is unpainted: off, bias, gain or logit",
                   default="off", choices=("off", "bias", "gain", "logit"), metavar="MODE"),
        flags.Flag("format", "mvtec, folder, flat, flat01, coco, yolo or jsonl; repeatable", default="mvtec",
                   many=True, metavar="NAME"),
        flags.Flag("with-normals", "write the normal images too", "on-or-off", "on"),
    ),
    "benchmark": (
        flags.Flag("arms", "where pairs come from: none, cutpaste, crop-paste, perlin, generated, reweighted",
                   default="all that are there", nargs="+", metavar="NAME"),
        flags.Flag("k", "numbers of real shots", int, "1 3 5 10", nargs="+", low=1, metavar="N"),
        flags.Flag("seeds", "repetitions, each with other shots and weights", int, "5", low=1),
        flags.Flag("pairs", "pairs that every arm adds", int, "200", low=1),
        flags.Flag("segmenter-steps", "optimizer steps of the segmenter", int, "1000", low=1),
        flags.Flag("segmenter-width", "channels of its first level", int, "16", low=4),
        flags.Flag("segmenter-size", "pixels along a side at which it sees images; a multiple of 8", int,
                   "64; 256 for given images", low=16),
        flags.Flag("quick", "k 1 and 5, 3 seeds, 24 pairs, 150 steps, width 8; two pairs of the inspection world",
                   bool),
    ),
    "output": (
        flags.Flag("output", "folder of the files", default="outputs/anomaly-JOB", short=("-o",), metavar="DIR"),
        flags.Flag("json", "print a JSON report instead of text", bool),
    ),
    "run": (
        flags.DEVICE,
        flags.Flag("seed", "seed of everything random", int, "0", low=0, high=flags.MAX_SEED),
        flags.Flag("estimate", "print memory and time of train or generate before weights are loaded, and stop", bool),
        *flags.only(flags.RUN, "resume", "dry-run", "config"),
    ),
    "workers": flags.WORKERS,
}  # fmt: skip
_EXAMPLES = """examples:
  dit-attn anomaly train --model org/name --normal good --defects bad \\
      --masks masks --product nut --defect scratch --output outputs/scratch
  dit-attn anomaly generate --model org/name --normal good \\
      --concept outputs/scratch/concept.safetensors --per-defect 100 \\
      --format mvtec --format coco --output outputs/pairs
  dit-attn anomaly generate --model org/name --normal good \\
      --concept scratch.safetensors --count 1000 --workers auto
  dit-attn anomaly benchmark --model org/name --data mvtec --product bottle \\
      --k 1 5 --output outputs/benchmark
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``anomaly``."""
    parsers.describe(
        parser,
        "anomaly JOB [options]",
        "Learn defects from a few images with masks (train), and make image-mask pairs of them on normal images "
        "(generate). Pairs that do not show the defect are rejected, kept apart with the reason, and made again. "
        "Measure what a segmenter learns from them next to cheap ways of making defects (benchmark).",
        _EXAMPLES,
    )
    parsers.add_groups(parser, GROUPS)


def run(args: argparse.Namespace) -> int:
    """Do the job. Returns 0, 1 where pairs are missing at the end, or 130 after Ctrl-C.

    Raises:
        DitAttnError: a flag, an image, a mask or the model cannot be used.
    """
    options = flags.merge(args, GROUPS, replaced=())
    if options["job"] not in JOBS:
        raise unknown("job", options["job"], JOBS)
    if options["job"] == "train":
        _check_train(options)
    else:
        engines.from_options(options, UNDIVIDED[options["job"]])
    if options["job"] == "benchmark":
        if refuse_several("anomaly benchmark"):
            return 2
        from dit_attn.cli.commands.anomaly import benchmark

        return benchmark.benchmark(options)
    from dit_attn.cli.commands.anomaly import jobs

    return jobs.train(options) if options["job"] == "train" else jobs.generate(options)


def _check_train(options: flags.Options) -> None:
    """Refuse workers and parts for a training."""
    for name in ("workers", "engine", "shard"):
        if name in options:
            raise DitAttnError(
                f"anomaly train has no items for --{name}: every step begins where the one before has ended; leave it "
                "out, or share the batches on several GPUs with accelerate launch"
            )
