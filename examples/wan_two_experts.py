"""Generate a video with Wan 2.2 A14B, whose two experts share one run, with one method for both or one each.

`pipe.transformer` denoises the first, noisy steps, `pipe.transformer_2` the rest.

python wan_two_experts.py                                        # the same method on both
python wan_two_experts.py --method none --method-2 block-sparse  # the noisy steps dense, the rest sparse
python wan_two_experts.py --tiny
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
    parser.add_argument("--model", default="Wan-AI/Wan2.2-T2V-A14B-Diffusers", help="Hub id or folder")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--prompt", default="A cat walks on the grass, realistic style, soft morning light")
    parser.add_argument("--negative-prompt", default="static, overexposed, blurred details, worst quality, low quality")
    parser.add_argument("--height", type=int, default=720)
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--frames", type=int, default=81, help="4 n + 1")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    # "re-ttention" is closer to dense, but its cache would take some 60 GiB an expert at this size: see `explain`.
    parser.add_argument("--method", default="rectified-spaattn", help="slug, or none (default: %(default)s)")
    parser.add_argument("--method-2", help="the same for the second expert (default: what --method says)")
    parser.add_argument("--output", type=Path, default=Path("wan22.mp4"))
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
    args.method_2 = args.method_2 or args.method
    slugs = {args.method, args.method_2} - {"none"}
    if not slugs:
        raise dit_attn.DitAttnError("--method none leaves both experts dense; give --method-2 a method")
    for slug in slugs:
        dit_attn.Method.from_dict({"method": slug})
    folder = args.output.parent
    if args.output.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise dit_attn.DitAttnError(f"--output {args.output} cannot be written; give a file in an existing folder")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise dit_attn.DitAttnError(f"--device {args.device}: no CUDA GPU here; give --device cpu, or try --tiny")


def load(args: argparse.Namespace) -> WanPipeline:
    if args.tiny:
        import tiny  # examples/tiny.py

        return tiny.wan(two_experts=True)
    vae = AutoencoderKLWan.from_pretrained(args.model, subfolder="vae", torch_dtype=torch.float32)
    pipe = WanPipeline.from_pretrained(args.model, vae=vae, torch_dtype=getattr(torch, args.dtype))
    if args.device == "cpu":
        return pipe
    pipe.enable_model_cpu_offload(device=args.device)  # one expert on the GPU at a time; methods work with it
    return pipe


def enable(pipe: WanPipeline, first: str, second: str) -> None:
    """Enable one method for both experts, or one each."""
    if first == second:
        # The preset is that of Wan 2.2, and settings such as dense_steps=0.1 count over the full run, whichever expert
        # has the step.
        dit_attn.enable(pipe, first)
        return
    # On its own an expert has the configuration of Wan 2.1 14B and gets that preset. Steps are those of the full run,
    # which is read from the running pipeline.
    for expert, slug in ((pipe.transformer, first), (pipe.transformer_2, second)):
        if slug != "none":
            dit_attn.enable(expert, slug)


def report(pipe: WanPipeline, first: str, second: str) -> None:
    """Print which attention calls were sparse, which were not and why."""
    if first == second:
        print(dit_attn.summary(pipe))
        return
    for name, slug in (("transformer", first), ("transformer_2", second)):
        print(f"{name}:\n{dit_attn.summary(getattr(pipe, name)) if slug != 'none' else 'stock'}\n")


def generate(args: argparse.Namespace) -> None:
    pipe = load(args)
    size = {"height": args.height, "width": args.width, "num_frames": args.frames}
    for slug in dict.fromkeys((args.method, args.method_2)):
        if slug != "none":
            print(f"{slug}:\n{dit_attn.explain(pipe, slug, **size)}\n")  # what can be gained if both experts have it

    enable(pipe, args.method, args.method_2)
    frames = pipe(
        args.prompt,
        negative_prompt=args.negative_prompt,
        guidance_scale=4.0,
        guidance_scale_2=3.0,
        num_inference_steps=args.steps,
        generator=torch.Generator("cpu").manual_seed(args.seed),
        **size,
    ).frames[0]

    export_to_video(frames, str(args.output), fps=16)
    report(pipe, args.method, args.method_2)
    print(f"{'output':<16} {args.output}")


if __name__ == "__main__":
    main()
