"""Enable a method in a denoising loop of your own: Wan's parts, no call of the pipeline.

A method has to know three things about each transformer call: the guidance branch, the step, and how many steps there
are. A stock pipeline that runs says so itself; here `dit_attn.run_context` says it. See `denoise`.

python own_denoising_loop.py --prompt "a cat walks on the grass" --output cat.mp4
python own_denoising_loop.py --tiny
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

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
    parser.add_argument("--scale", type=float, default=5.0, help="classifier-free guidance")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--method", default="re-ttention", help="slug of a method (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("own_loop.mp4"))
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
    """Load the parts; the pipeline only holds them, and encodes the prompts."""
    if args.tiny:
        import tiny  # examples/tiny.py

        return tiny.wan()
    vae = AutoencoderKLWan.from_pretrained(args.model, subfolder="vae", torch_dtype=torch.float32)
    return WanPipeline.from_pretrained(args.model, vae=vae, torch_dtype=getattr(torch, args.dtype)).to(args.device)


def denoise(transformer: Any, scheduler: Any, latents: torch.Tensor, prompts: dict[str, Any], scale: float) -> Any:
    """Run the loop; ``prompts`` holds the embeddings of the branches ``cond`` and ``uncond``.

    A loop over windows or tiles adds `window=`, the index of the window, so that each has a state of its own; one that
    stacks the branches in the batch gives their names in order, `branch=("uncond", "cond")`. Without `run_context` only
    the time steps of the calls are seen: the summary says what could not be known then.
    """
    steps = len(scheduler.timesteps)
    for index, t in enumerate(scheduler.timesteps):
        predicted = {}
        for branch in ("cond", "uncond"):
            with dit_attn.run_context(transformer, step=index, steps=steps, branch=branch):
                predicted[branch] = transformer(
                    hidden_states=latents.to(transformer.dtype),
                    timestep=t.expand(latents.shape[0]),
                    encoder_hidden_states=prompts[branch],
                    return_dict=False,
                )[0]
        guided = predicted["uncond"] + scale * (predicted["cond"] - predicted["uncond"])
        latents = scheduler.step(guided, t, latents, return_dict=False)[0]
    return latents


@torch.no_grad()
def generate(args: argparse.Namespace) -> None:
    pipe = load(args)
    transformer, scheduler, vae = pipe.transformer, pipe.scheduler, pipe.vae
    size = {"height": args.height, "width": args.width, "num_frames": args.frames}
    print(dit_attn.explain(transformer, args.method, **size), end="\n\n")  # what can be gained, before the run

    dit_attn.enable(transformer, args.method)  # on the transformer itself: no pipeline is needed
    text = {"max_sequence_length": 512, "device": args.device}
    cond, uncond = pipe.encode_prompt(args.prompt, args.negative_prompt, **text)
    scheduler.set_timesteps(args.steps, device=args.device)
    shape = (  # of the latents: channels, time, height, width
        transformer.config.in_channels,
        (args.frames - 1) // pipe.vae_scale_factor_temporal + 1,
        args.height // pipe.vae_scale_factor_spatial,
        args.width // pipe.vae_scale_factor_spatial,
    )
    noise = torch.randn(1, *shape, generator=torch.Generator("cpu").manual_seed(args.seed)).to(args.device)
    latents = denoise(transformer, scheduler, noise, {"cond": cond, "uncond": uncond}, args.scale)

    mean, std = (
        torch.tensor(values, device=args.device).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    video = vae.decode((latents * std + mean).to(vae.dtype), return_dict=False)[0]
    export_to_video(pipe.video_processor.postprocess_video(video)[0], str(args.output), fps=16)
    print(dit_attn.summary(transformer))  # which attention calls were sparse, which were not and why
    print(f"{'output':<16} {args.output}")


if __name__ == "__main__":
    main()
