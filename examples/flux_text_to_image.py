"""Generate an image with Flux.1 and sparse attention. It pays at large sizes: `explain` says how much it can.

python flux_text_to_image.py --prompt "a lighthouse in a storm" --width 2048 --height 1024
python flux_text_to_image.py --tiny
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
from diffusers import FluxPipeline

import dit_attn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="black-forest-labs/FLUX.1-dev", help="Hub id or folder")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--prompt", default="A lighthouse on a cliff in a storm, waves breaking, wide shot, photograph")
    parser.add_argument("--height", type=int, default=1024)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--method", default="re-ttention", help="slug of a method (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("flux.png"))
    parser.add_argument("--tiny", action="store_true", help="a tiny random model and a small size, on the CPU")
    args = parser.parse_args()
    if args.tiny:
        vars(args).update(device="cpu", height=512, width=512, steps=8)
    try:
        check(args)
        generate(args)
    except (ValueError, OSError) as error:  # a DitAttnError is a ValueError; diffusers raises both for bad input
        parser.exit(2, f"error: {str(error).splitlines()[0]}\n")


def check(args: argparse.Namespace) -> None:
    """Refuse what cannot work before anything is loaded."""
    dit_attn.Method.from_dict({"method": args.method})
    folder = args.output.parent
    if args.output.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise dit_attn.DitAttnError(f"--output {args.output} cannot be written; give a file in an existing folder")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise dit_attn.DitAttnError(f"--device {args.device}: no CUDA GPU here; give --device cpu, or try --tiny")


def load(args: argparse.Namespace) -> FluxPipeline:
    if args.tiny:
        import tiny  # examples/tiny.py

        return tiny.flux()
    return FluxPipeline.from_pretrained(args.model, torch_dtype=getattr(torch, args.dtype)).to(args.device)


def generate(args: argparse.Namespace) -> None:
    pipe = load(args)
    size = {"height": args.height, "width": args.width}
    print(dit_attn.explain(pipe, args.method, **size), end="\n\n")  # what can be gained, before the run is paid for

    dit_attn.enable(pipe, args.method)  # settings from the preset of this very model
    image = pipe(
        args.prompt,
        guidance_scale=3.5,
        num_inference_steps=args.steps,
        generator=torch.Generator("cpu").manual_seed(args.seed),
        **size,
    ).images[0]

    image.save(args.output)
    print(dit_attn.summary(pipe))  # which attention calls were sparse, which were not and why
    print(f"{'output':<16} {args.output}")


if __name__ == "__main__":
    main()
