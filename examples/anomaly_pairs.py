"""Learn a defect from a few images with masks, and make image-mask pairs of it on normal images.

Folders of yours, with any PixArt, SD3 or Flux checkpoint; `--tiny` draws a folder of nuts with scratches and uses the
small model in the package, which was never shown that pair. The measure of success is a segmenter: see
`dit-attn anomaly benchmark`.

python anomaly_pairs.py --normal good --defects bad --masks masks --product nut --defect scratch
python anomaly_pairs.py --tiny
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

import dit_attn
from dit_attn import models
from dit_attn.eval.inspection_world.folders import write_folders
from dit_attn.pipelines import AnomalyGenerator
from dit_attn.pipelines.anomaly import Backbone, GenerateConfig, MaskSource, TrainConfig, train
from dit_attn.pipelines.anomaly.sources import from_folders


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="PixArt-alpha/PixArt-Sigma-XL-2-1024-MS", help="Hub id or folder")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--normal", type=Path, help="folder of normal images")
    parser.add_argument("--defects", type=Path, help="folder of images with the defect")
    parser.add_argument("--masks", type=Path, help="folder of their masks")
    parser.add_argument("--product", default="nut")
    parser.add_argument("--defect", default="scratch")
    parser.add_argument("--count", type=int, default=100, help="pairs (default: %(default)s)")
    parser.add_argument("--train-steps", type=int, default=200)
    parser.add_argument("--steps", type=int, default=20, help="denoising steps of a pair")
    parser.add_argument("--output", type=Path, default=Path("pairs"))
    parser.add_argument("--tiny", action="store_true", help="the model in the package and drawn images, on the CPU")
    args = parser.parse_args()
    try:
        make_pairs(args)
    except (ValueError, OSError) as error:  # a DitAttnError is a ValueError; diffusers raises both for bad input
        parser.exit(2, f"error: {str(error).splitlines()[0]}\n")


def make_pairs(args: argparse.Namespace) -> None:
    if args.tiny:
        args.normal, args.defects, args.masks = write_folders(
            args.output / "data", args.product, args.defect, normals=8, shots=3
        )
        args.count, args.device = min(args.count, 4), "cpu"
    elif None in (args.normal, args.defects, args.masks):
        raise dit_attn.DitAttnError("give --normal, --defects and --masks, or --tiny to try this script")
    source = from_folders(args.normal, args.defects, args.masks, args.product, args.defect)
    source.check()
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise dit_attn.DitAttnError("no CUDA GPU here; use --tiny to try this script on a CPU")
    pipe = models.load("tiny-inspect") if args.tiny else DiffusionPipeline.from_pretrained(args.model)
    pipe.to(args.device).set_progress_bar_config(disable=True)

    concept = train(Backbone(pipe), source, TrainConfig(steps=args.train_steps), args.output / "concept")
    generator = AnomalyGenerator(pipe, concept, GenerateConfig(steps=args.steps))
    pair = (args.product, args.defect)
    masks = {pair: MaskSource("real", concept.shapes[f"{args.product}+{args.defect}"])}  # of the shots, moved and bent
    summary = generator.run(args.output, source.normals, {pair: args.count}, masks)
    made = summary["pairs"][f"{args.product}+{args.defect}"]
    print(f"{made['accepted']} pairs in {args.output / 'accepted'}, {made['rejected']} rejected")


if __name__ == "__main__":
    main()
