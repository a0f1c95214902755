"""``dit-attn train NAME``: train an embedded model, on a CPU or a GPU, resumable at any moment."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_attn.cli import load_pipeline
from dit_attn.cli import options as flags
from dit_attn.cli import parser as parsers
from dit_attn.cli.progress import loading_libraries
from dit_attn.cli.source_index import constant
from dit_attn.errors import DitAttnError, require_torchvision, unknown

if TYPE_CHECKING:
    from dit_attn.models.loop import Run
    from dit_attn.models.recipe import Recipe

PIPELINE_FOLDER = "pipeline"
EDITS = "tiny-edit"


GROUPS = {
    "model": (
        flags.Flag("name", "tiny-image, tiny-video, tiny-joint, tiny-multi, tiny-edit, tiny-inspect or world-clip",
                   default="required", metavar="NAME", positional=True),
    ),
    "training": (
        flags.Flag("tail", "go on from the shipped weights, at full size and falling rates", bool),
        flags.Flag("steps", "optimizer steps; stages and learning rate stretch with it", int, "the recipe's", low=1),
        flags.Flag("rate", "factor on the learning rates, e.g. .3 for a second tail", float, "1"),
        flags.Flag("minutes", "stop after this many minutes, with a checkpoint to resume from", float, "no limit"),
        flags.Flag("seed", "seed of weights and data; fixed by --resume", int, "0", low=0),
        flags.Flag("checkpoint-minutes", "minutes between checkpoints", float, "5"),
    ),
    "evaluation": (
        flags.Flag("eval-every", "score held-out captions every N steps", int, "0, never", low=0),
        flags.Flag("eval-count", "captions per such score", int, "32", low=1),
        flags.Flag("final-count", "captions of the final score; 0 for none", int, "200", low=0),
    ),
    "output": (flags.Flag("output", "folder of the run", default="outputs/train-NAME", short=("-o",), metavar="DIR"),),
    "run": (
        flags.DEVICE,
        flags.Flag("threads", "CPU threads of torch", int, "torch's own choice", low=1),
        flags.Flag("resume", "continue from the checkpoint in --output", bool),
    ),
}  # fmt: skip
_EXAMPLES = """examples:
  dit-attn train tiny-image --minutes 30
  dit-attn train tiny-image --resume
  dit-attn train tiny-image --tail --output outputs/tail
"""


@dataclass(frozen=True)
class TrainConfig:
    """One training, checked.

    Attributes:
        name: of the model.
        output: folder of the run.
        tail: go on from the shipped weights.
        steps: optimizer steps; ``None``: those of the recipe.
        rate: factor on the learning rates of the recipe.
        minutes: time limit; ``None`` for none.
        checkpoint_minutes: between checkpoints.
        seed: of weights and data.
        eval_every: steps between scores, 0 for none.
        eval_count, final_count: captions of such a score, and of the last one.
        device: auto, cpu, cuda or cuda:N.
        threads: of torch; ``None`` leaves them.
        resume: continue from the checkpoint.
    """

    name: str
    output: Path
    tail: bool = False
    steps: int | None = None
    rate: float = 1.0
    minutes: float | None = None
    checkpoint_minutes: float = 5.0
    seed: int = 0
    eval_every: int = 0
    eval_count: int = 32
    final_count: int = 200
    device: str = "auto"
    threads: int | None = None
    resume: bool = False

    @classmethod
    def from_options(cls, options: flags.Options) -> TrainConfig:
        """Check the flags.

        Raises:
            DitAttnError: an unknown model, one whose pipeline lacks a library, a time that is not above 0, a device
                that cannot train, or a folder that holds another run.
        """
        names = (*constant("dit_attn.models.recipe", "RECIPES"), constant("dit_attn.models.world_clip", "NAME"))
        for name in ("rate", "minutes", "checkpoint_minutes"):
            if name in options and options[name] <= 0.0:
                raise DitAttnError(f"--{name.replace('_', '-')} is {options[name]:g}, but must be more than 0")
        if options["name"] not in names:
            raise unknown("model", options["name"], names)
        clip = options["name"] == names[-1]
        for flag in ("tail", "rate"):
            if clip and flag in options:
                raise DitAttnError(f"--{flag} is for the pipelines, not for {names[-1]}; leave it out")
        if options["name"] == EDITS:
            require_torchvision("OmniGenPipeline")
        if options.get("device") == "mps":
            raise DitAttnError("--device mps cannot train; use auto, cpu, cuda or cuda:N")
        folder = f"tail-{options['name']}" if options.get("tail") else f"train-{options['name']}"
        output = Path(options.get("output", Path("outputs") / folder)).expanduser()
        checkpoint = constant("dit_attn.models.world_clip" if clip else "dit_attn.models.loop", "CHECKPOINT")
        if not options.get("resume") and (output / checkpoint).exists():
            raise DitAttnError(f"{output} already holds a run; add --resume to continue it or choose another --output")
        return cls(**{**options.values, "output": output})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``train``."""
    parsers.describe(
        parser,
        "train NAME [options]",
        "Train an embedded model from its recipe. The run can be stopped at any moment and resumed; the finished model "
        f"is written to OUTPUT/{PIPELINE_FOLDER} as a diffusers folder.",
        _EXAMPLES,
    )
    parsers.add_groups(parser, GROUPS)


def run(args: argparse.Namespace) -> int:
    """Train, score and export. Returns 0, or 130 after Ctrl-C.

    Raises:
        DitAttnError: an argument or the output folder does not fit.
    """
    config = TrainConfig.from_options(flags.merge(args, GROUPS))
    with loading_libraries():
        from dit_attn.models.loop import fit
        from dit_attn.models.recipe import recipe
        from dit_attn.models.world_clip import NAME

        load_pipeline.quiet(show_progress=False)
    if config.name == NAME:
        return _train_clip(config)
    chosen, output = recipe(config.name, tail=config.tail), config.output
    job = _start(config, chosen.stretched(config.steps or chosen.steps, config.rate))
    try:
        fit(
            job,
            output,
            minutes=config.minutes,
            checkpoint_minutes=config.checkpoint_minutes,
            evaluate=lambda live: _score(live, config.eval_count)[0],
            eval_every=config.eval_every,
        )
    except KeyboardInterrupt:
        print(f"stopped at step {job.step} of {job.recipe.steps}; {_how_to_resume(config)}", file=sys.stderr)
        return 130
    if job.step < job.recipe.steps:
        print(f"time is up at step {job.step} of {job.recipe.steps}; {_how_to_resume(config)}")
        return 0
    _finish(job, output, config.final_count)
    return 0


def _train_clip(config: TrainConfig) -> int:
    """Train ``world-clip``. Returns 0, or 130 after Ctrl-C."""
    from dit_attn.models import world_clip

    output = config.output
    device = _prepared(config)
    recipe = world_clip.Recipe()
    job = world_clip.Training(replace(recipe, steps=config.steps or recipe.steps), config.seed, device)
    if config.resume:
        job.restore(config.output)
    try:
        world_clip.fit(job, output, config.minutes, config.checkpoint_minutes)
    except KeyboardInterrupt:
        print(f"stopped at step {job.step} of {job.recipe.steps}; {_how_to_resume(config)}", file=sys.stderr)
        return 130
    if job.step < job.recipe.steps:
        print(f"time is up at step {job.step} of {job.recipe.steps}; {_how_to_resume(config)}")
        return 0
    found = world_clip.export(job, output / "model")["held_out"]
    print(
        f"of {found['of']:.0f} held-out scenes, {found['image_to_caption']:.1%} of the images find their caption and "
        f"{found['caption_to_image']:.1%} of the captions their image\nmodel written to {output / 'model'}"
    )
    return 0


def _device(name: str) -> Any:
    """The torch device of ``--device``; ``auto`` is a CUDA GPU or the CPU, on which alone training was tried."""
    device = load_pipeline.pick_device(name)
    return load_pipeline.pick_device("cpu") if device.type == "mps" else device


def _start(config: TrainConfig, recipe: Recipe) -> Run:
    """Begin a run, or restore the one in the output folder with ``--resume``."""
    from dit_attn.models.loop import Run

    job = Run(recipe, config.seed, _prepared(config))
    if config.resume:
        job.restore(config.output)
    return job


def _prepared(config: TrainConfig) -> Any:
    """Return the device, once the folder is there."""
    import torch

    output = config.output
    device = _device(config.device)
    if config.threads:
        torch.set_num_threads(config.threads)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DitAttnError(f"cannot write to --output {output} ({error.strerror}); choose another folder") from error
    return device


def _score(job: Run, count: int) -> tuple[dict[str, float], dict[str, Any], list[Any]]:
    """(accuracy per attribute and outlines, full table, samples) on held-out captions, through the stock pipeline."""
    from dit_attn.models.evaluate import evaluate
    from dit_attn.models.export import pipeline_of
    from dit_attn.models.registry import call_defaults

    pipeline = pipeline_of(job).to(job.device)
    if job.recipe.kind == "inspect":
        return _score_painting(pipeline, call_defaults(job.recipe.name)["height"], count)
    if job.recipe.kind == "edit":
        from dit_attn.models import evaluate_edits

        figures, edited = evaluate_edits.evaluate(pipeline, call_defaults(job.recipe.name), count)
        return evaluate_edits.short(figures), figures, edited
    figures, samples = evaluate(pipeline, job.recipe.kind, call_defaults(job.recipe.name), count)
    short = {name: cell["accuracy"] for name, cell in figures["attributes"].items()}
    short["whole_caption"] = figures["whole_caption"]["accuracy"]
    short |= {name: cell["mean"] for name, cell in figures["outlines"].items() if cell["of"]}
    for name, group in figures.get("objects", {}).items():
        short |= {f"{name}:{word}": cell["accuracy"] for word, cell in group.items()}
    return short, figures, samples


def _score_painting(pipeline: Any, size: int, count: int) -> tuple[dict[str, float], dict[str, Any], list[Any]]:
    """The same of a model that paints defects: mean ratio with the word, and with the prompt of the normal product."""
    from dit_attn.pipelines.anomaly.base_gate import evaluate_base

    pipeline.set_progress_bar_config(disable=True)
    figures, painted = evaluate_base(pipeline, size, count)
    groups = {name: figures[name] for name in ("seen_pairs", "held_out_pairs") if figures[name]["of"]}
    short = {f"{name}:{arm}": group[arm]["ratio"] for name, group in groups.items() for arm in ("word", "control")}
    return short, figures, painted


def _finish(job: Run, output: Path, count: int) -> None:
    """Score, export and say where everything is."""
    from dit_attn.cli import outputs
    from dit_attn.models.evaluate import contact_sheet
    from dit_attn.models.export import export

    figures: dict[str, Any] = {}
    if count:
        _, figures, samples = _score(job, count)
        if job.recipe.kind == "inspect":
            from dit_attn.contact_sheet import flow
            from dit_attn.pipelines.anomaly.base_gate import report_lines

            sheet, lines = flow([one.cell for one in samples[:64]]), report_lines(figures)
        elif job.recipe.kind == "edit":
            from dit_attn.models import evaluate_edits

            sheet, lines = evaluate_edits.contact_sheet(samples[:64]), evaluate_edits.report_lines(figures)
        else:
            sheet, lines = contact_sheet(samples[:64]), _report_lines(figures, count)
        outputs.write_image(sheet, output / "samples.png")
        print("\n".join(lines))
    export(job, output / PIPELINE_FOLDER, figures)
    print(f"pipeline written to {output / PIPELINE_FOLDER}")


def _report_lines(figures: dict[str, Any], count: int) -> list[str]:
    """Figures of `models.evaluate.table` in words: shares in percent, outlines as they are, objects by their number."""

    def percent(cells: dict[str, Any]) -> str:
        return ", ".join(f"{name.replace('_', ' ')} {100 * cell['accuracy']:.0f} %" for name, cell in cells.items())

    whole = {**figures["attributes"], "whole_caption": figures["whole_caption"]}
    lines = [f"on {count} held-out captions: {percent(whole)}"]
    drawn = {name: cell["mean"] for name, cell in figures["outlines"].items() if cell["of"]}
    if drawn:
        lines.append("outlines, 1 is drawn: " + ", ".join(f"{name} {value:.2f}" for name, value in drawn.items()))
    for number, group in figures.get("objects", {}).items():
        name = {"all": "all objects", "1": "the object of a scene of 1"}.get(number, f"objects of scenes of {number}")
        lines.append(f"{name}: {percent(group)}")
    return lines


def _how_to_resume(config: TrainConfig) -> str:
    tail = " --tail" if config.tail else ""
    steps = f" --steps {config.steps}" if config.steps else ""
    rate = f" --rate {config.rate:g}" if config.rate != 1.0 else ""
    return f"continue with `dit-attn train {config.name}{tail} --output {config.output}{steps}{rate} --resume`"
