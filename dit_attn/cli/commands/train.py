"""`dit-attn train NAME`: train an embedded model from nothing, on a CPU or a GPU, resumable at any moment."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_attn.errors import DitAttnError, unknown

if TYPE_CHECKING:
    from dit_attn.models.loop import Run
    from dit_attn.models.recipe import Recipe

PIPELINE_FOLDER = "pipeline"


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Register `train` and return its parser."""
    parser = subparsers.add_parser(
        "train",
        help="train an embedded model (tiny-image, tiny-video, tiny-joint, world-clip) from its recipe",
        description="Train an embedded model from its recipe. The run can be stopped at any moment and resumed; the "
        f"finished model is written to OUTPUT/{PIPELINE_FOLDER} as a diffusers folder.",
    )
    parser.add_argument("name", help="tiny-image, tiny-video, tiny-joint or world-clip")
    parser.add_argument("--output", type=Path, help="folder of the run (default: outputs/train-NAME)")
    parser.add_argument("--steps", type=int, help="length of the run; stages and learning rate stretch with it")
    parser.add_argument("--minutes", type=float, help="stop after this many minutes, leaving a resumable checkpoint")
    parser.add_argument(
        "--seed", type=int, default=0, help="of weights and data (default: 0; kept by --resume)"
    )
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint in OUTPUT")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--threads", type=int, help="CPU threads of torch (default: torch's own choice)")
    parser.add_argument("--eval-every", type=int, default=0, help="score held-out captions every N steps (0: never)")
    parser.add_argument("--eval-count", type=int, default=32, help="captions per such score (default: 32)")
    parser.add_argument("--final-count", type=int, default=200, help="captions of the final score (0: none)")
    parser.add_argument(
        "--checkpoint-minutes", type=float, default=5.0, help="minutes between checkpoints (default: 5)"
    )
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Train, score and export. Returns 0, or 130 after Ctrl-C.

    Raises:
        DitAttnError: an argument or the output folder does not fit.
    """
    from dit_attn.models.recipe import RECIPES, recipe
    from dit_attn.models.world_clip import NAME

    _check(args)
    if args.name not in (*RECIPES, NAME):
        raise unknown("model", args.name, (*RECIPES, NAME))
    output = args.output or Path("outputs") / f"train-{args.name}"
    if args.name == NAME:
        return _train_clip(args, output)
    chosen = recipe(args.name)
    job = _start(args, chosen.with_steps(args.steps) if args.steps else chosen, output)
    from dit_attn.models.loop import fit

    try:
        fit(
            job,
            output,
            minutes=args.minutes,
            checkpoint_minutes=args.checkpoint_minutes,
            evaluate=lambda live: _score(live, args.eval_count)[0],
            eval_every=args.eval_every,
        )
    except KeyboardInterrupt:
        print(f"stopped at step {job.step} of {job.recipe.steps}; {_how_to_resume(args, output)}", file=sys.stderr)
        return 130
    if job.step < job.recipe.steps:
        print(f"time is up at step {job.step} of {job.recipe.steps}; {_how_to_resume(args, output)}")
        return 0
    _finish(job, output, args.final_count)
    return 0


def _train_clip(args: argparse.Namespace, output: Path) -> int:
    """Train ``world-clip``. Returns 0, or 130 after Ctrl-C."""
    from dataclasses import replace

    from dit_attn.models import world_clip

    device = _prepared(args, output, world_clip.CHECKPOINT)
    recipe = world_clip.Recipe()
    job = world_clip.Training(replace(recipe, steps=args.steps or recipe.steps), args.seed, device)
    if args.resume:
        job.restore(output)
    try:
        world_clip.fit(job, output, args.minutes, args.checkpoint_minutes)
    except KeyboardInterrupt:
        print(f"stopped at step {job.step} of {job.recipe.steps}; {_how_to_resume(args, output)}", file=sys.stderr)
        return 130
    if job.step < job.recipe.steps:
        print(f"time is up at step {job.step} of {job.recipe.steps}; {_how_to_resume(args, output)}")
        return 0
    found = world_clip.export(job, output / "model")["held_out"]
    print(
        f"of {found['of']:.0f} held-out scenes, {found['image_to_caption']:.1%} of the pictures find their caption and "
        f"{found['caption_to_image']:.1%} of the captions their picture\nmodel written to {output / 'model'}"
    )
    return 0


def _check(args: argparse.Namespace) -> None:
    """Refuse values that cannot work, each with the reason."""
    lowest = {"steps": 1, "seed": 0, "threads": 1, "eval_every": 0, "eval_count": 1, "final_count": 0}
    for name, least in lowest.items():
        value = getattr(args, name)
        if value is not None and value < least:
            raise DitAttnError(f"--{name.replace('_', '-')} is {value}, but must be at least {least}")
    for name in ("minutes", "checkpoint_minutes"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise DitAttnError(f"--{name.replace('_', '-')} is {value}, but must be more than 0")


def _device(name: str) -> Any:
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise DitAttnError(f"unknown --device {name!r}; use auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise DitAttnError(f"--device {name!r} cannot train; use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DitAttnError(
            f"--device {name!r} is not there ({torch.cuda.device_count()} CUDA devices); use --device cpu"
        )
    return device


def _start(args: argparse.Namespace, recipe: Recipe, output: Path) -> Run:
    """A fresh run, or the one in `output` with `--resume`."""
    from dit_attn.models.loop import CHECKPOINT, Run

    job = Run(recipe, args.seed, _prepared(args, output, CHECKPOINT))
    if args.resume:
        job.restore(output)
    return job


def _prepared(args: argparse.Namespace, output: Path, checkpoint: str) -> Any:
    """The device, once the folder is there; a folder that holds another run is refused."""
    import torch

    device = _device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    if not args.resume and (output / checkpoint).exists():
        raise DitAttnError(f"{output} already holds a run; add --resume to continue it or choose another --output")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DitAttnError(f"cannot write to --output {output} ({error.strerror}); choose another folder") from error
    return device


def _score(job: Run, count: int) -> tuple[dict[str, float], dict[str, Any], list[Any]]:
    """(accuracy per attribute, full table, samples) on `count` held-out captions, through the stock pipeline."""
    from dit_attn.models.evaluate import evaluate
    from dit_attn.models.export import pipeline_of
    from dit_attn.models.registry import call_defaults

    pipeline = pipeline_of(job).to(job.device)
    figures, samples = evaluate(pipeline, job.recipe.kind, call_defaults(job.recipe.name), count)
    short = {name: cell["accuracy"] for name, cell in figures["attributes"].items()}
    return {**short, "whole_caption": figures["whole_caption"]["accuracy"]}, figures, samples


def _finish(job: Run, output: Path, count: int) -> None:
    """Score, export and say where everything is."""
    from dit_attn.cli import outputs
    from dit_attn.models.evaluate import contact_sheet
    from dit_attn.models.export import export

    figures: dict[str, Any] = {}
    if count:
        short, figures, samples = _score(job, count)
        outputs.write_image(contact_sheet(samples[:64]), output / "samples.png")
        print("held-out captions: " + ", ".join(f"{name} {value:.3f}" for name, value in short.items()))
    export(job, output / PIPELINE_FOLDER, figures)
    print(f"pipeline written to {output / PIPELINE_FOLDER}")


def _how_to_resume(args: argparse.Namespace, output: Path) -> str:
    steps = f" --steps {args.steps}" if args.steps else ""
    return f"continue with `dit-attn train {args.name} --output {output}{steps} --resume`"
