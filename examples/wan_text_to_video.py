"""Generate a video with Wan 2.1 and sparse attention.

python wan_text_to_video.py --prompt "a cat walks on the grass" --output cat.mp4
python wan_text_to_video.py --tiny
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, WanPipeline
from diffusers.utils import export_to_video

import dit_attn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Wan-AI/Wan2.1-T2V-1.3B-Diffusers", help="Hub id or folder")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--prompt", default="A cat walks on the grass, realistic style, soft morning light")
    parser.add_argument("--negative-prompt", default="static, overexposed, blurred details, worst quality, low quality")
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--width", type=int, default=832)
    parser.add_argument("--frames", type=int, default=81, help="4 n + 1")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--method", default="re-ttention", help="slug of a method (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("wan.mp4"))
    parser.add_argument("--tiny", action="store_true", help="a tiny random model and a small size, on the CPU")
    args = parser.parse_args()
    if args.tiny:
        vars(args).update(device="cpu", height=192, width=256, frames=13, steps=8)
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


def load(args: argparse.Namespace) -> WanPipeline:
    if args.tiny:
        import tiny  # examples/tiny.py

        return tiny.wan()
    vae = AutoencoderKLWan.from_pretrained(args.model, subfolder="vae", torch_dtype=torch.float32)
    return WanPipeline.from_pretrained(args.model, vae=vae, torch_dtype=getattr(torch, args.dtype)).to(args.device)


def generate(args: argparse.Namespace) -> None:
    pipe = load(args)
    size = {"height": args.height, "width": args.width, "num_frames": args.frames}
    print(dit_attn.explain(pipe, args.method, **size), end="\n\n")  # what can be gained, before the run is paid for

    dit_attn.enable(pipe, args.method)  # settings from the preset of this very model
    frames = pipe(
        args.prompt,
        negative_prompt=args.negative_prompt,
        guidance_scale=5.0,
        num_inference_steps=args.steps,
        generator=torch.Generator("cpu").manual_seed(args.seed),
        **size,
    ).frames[0]

    export_to_video(frames, str(args.output), fps=16)
    print(dit_attn.summary(pipe))  # which attention calls were sparse, which were not and why
    print(f"{'output':<16} {args.output}")


if __name__ == "__main__":
    main()
