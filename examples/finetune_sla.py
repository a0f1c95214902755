"""Fine-tune a Wan pipeline with SLA in it: attention of which a tenth is exact, and the rest linear.

The dense model draws the examples: a few calls of each of its own runs, with what it predicted there. The transformer
is then trained with SLA enabled to predict the same. Stop it whenever you like; `--resume` goes on.

python finetune_sla.py --prompts prompts.txt --output runs/sla
python finetune_sla.py --tiny
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from diffusers import WanPipeline

import dit_attn
from dit_attn.pipelines.finetune import Finetune, FinetuneConfig, record_examples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Wan-AI/Wan2.1-T2V-1.3B-Diffusers", help="Hub id or folder")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--prompts", type=Path, help="text file, one prompt a line")
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--width", type=int, default=832)
    parser.add_argument("--frames", type=int, default=81, help="4 n + 1")
    parser.add_argument("--steps", type=int, default=50, help="denoising steps of the runs that draw examples")
    parser.add_argument("--density", type=float, default=0.1, help="share of the key blocks that stays exact")
    parser.add_argument("--train-steps", type=int, default=2000)
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--output", type=Path, default=Path("runs/sla"))
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="a tiny random model and a small size, on the CPU")
    args = parser.parse_args()
    try:
        finetune(args)
    except dit_attn.DitAttnError as error:
        sys.exit(f"{Path(__file__).name}: {error}")


def finetune(args: argparse.Namespace) -> None:
    prompts = ["a cat walks on the grass", "waves on a beach at dusk"]
    if args.prompts is not None:
        prompts = [line for line in args.prompts.read_text().splitlines() if line.strip()]
    if args.tiny:
        import tiny

        pipe, args.height, args.width, args.frames, args.steps, args.train_steps = tiny.wan(), 192, 256, 13, 2, 2
    else:
        if args.device.startswith("cuda") and not torch.cuda.is_available():
            raise dit_attn.DitAttnError("no CUDA GPU here; use --tiny to try this script on a CPU")
        pipe = WanPipeline.from_pretrained(args.model).to(args.device)  # fp32 weights, bf16 where it computes
    pipe.set_progress_bar_config(leave=False)

    call = {"height": args.height, "width": args.width, "num_frames": args.frames, "num_inference_steps": args.steps}
    examples = record_examples(pipe, prompts, args.output / "data", calls_per_run=1 if args.tiny else 8, call=call)
    print(f"{len(examples)} examples in {args.output / 'data'}")

    config = FinetuneConfig(
        dit_attn.SLA(density=args.density),
        steps=args.train_steps,
        batch=1,
        lr=args.lr,
        ema=0.99,
        bf16=not args.tiny,
        gradient_checkpointing=not args.tiny,
    )
    job = Finetune(pipe, config, examples)
    if args.resume:
        job.restore(args.output)
    job.fit(args.output, lambda step, loss: print(f"step {step}: loss {loss:.4g}", end="\r", flush=True))

    print(dit_attn.summary(pipe.transformer))
    written = job.export(args.output)  # dit_attn.enable(pipe, "runs/sla/method") on the tuned transformer
    print(f"written: {', '.join(map(str, written))}")


if __name__ == "__main__":
    main()
