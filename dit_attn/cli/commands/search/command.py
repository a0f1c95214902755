"""``dit-attn search``: which attention heads to perturb, by an objective; a file, a page, and what it took."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from dit_attn.cli import options as flags
from dit_attn.cli.commands.search.config import PAGE
from dit_attn.errors import DitAttnError

if TYPE_CHECKING:
    from dit_attn.cli.model_source import Source
    from dit_attn.pipelines.head_search.evaluation import Pair

OBJECTIVES = (
    "clip-world", "verifier", "verifier-whole", "fid-world", "drawn-world", "clip", "style", "pickscore", "hpsv2",
    "aesthetic",
)  # fmt: skip
STRATEGIES = ("greedy", "halving", "gradient")
_SEARCH = (
    flags.Flag("objective", "what to raise (default: clip-world for embedded models, else clip)", choices=OBJECTIVES),
    flags.Flag("strategy", "greedy: every head on every pair (the paper, default); halving: successive halving; "
               "gradient: screened by one backward pass", choices=STRATEGIES),
    flags.Flag("rounds", "rounds (default: 3)", int, low=1, high=10_000),
    flags.Flag("per-round", "heads that join in a round (default: 3)", int, low=1, high=10_000),
    flags.Flag("pairs", "pairs of prompt and noise to search on (default: all prompts; 4 captions without any)", int,
               low=1, high=100_000),
    flags.Flag("held-out", "further pairs to check on, never searched on (default: 0)", int, low=0, high=100_000),
    flags.Flag("controls", "random sets of as many heads to check beside (default: 1)", int, low=0, high=1000),
    flags.Flag("layers", "also check every whole layer beside (layer-level PAG)", bool),
    flags.Flag("tune", "sweeps over the strengths of the found heads (default: 0)", int, low=0, high=100),
    flags.Flag("search-steps", "denoising steps of candidates: fewer are cheaper (default: those of the run)", int,
               low=1, high=100_000),
    flags.Flag("keep", "halving: a rung keeps one head of so many (default: 4)", float, low=1.1, high=1000.0),
    flags.Flag("screen", "gradient: share of the heads that is then measured fully (default: 0.15)", float, low=1e-6,
               high=1.0),
    flags.Flag("batch", "pairs in one call of the pipeline (default: 4)", int, low=1, high=4096),
)  # fmt: skip
_GUIDANCE = (
    flags.Flag("scale", "strength w of the push (default: 3)", float, low=0.0, high=1e6),
    flags.Flag("u", "strength of a perturbed head, 0 to 1 (default: 1)", float, low=0.0, high=1.0),
    flags.Flag("target", "what takes the place of a head's map (default: identity)",
               choices=("identity", "uniform", "mean-query")),
    flags.Flag("joint", "what the identity means on a joint sequence (default: joint)",
               choices=("joint", "image-rows", "ii-logit-mask", "ii-mass-to-diagonal")),
    flags.Flag("guidance-scale", "classifier-free guidance during the search (default: 1, none)", float, low=0.0),
)  # fmt: skip
_SCORERS = (
    flags.Flag("style", "objective style: words in front of every prompt", metavar="TEXT"),
    flags.Flag("clip", "objectives clip and style: CLIP model, folder or Hub name, or clip-world", metavar="NAME"),
    flags.Flag("weights", "objectives pickscore, hpsv2, aesthetic: folder of the scorer", metavar="DIR"),
    flags.Flag("weights-head", "objective aesthetic: file with the layers on top", metavar="FILE"),
    flags.Flag("reference", "objective fid-world: folder of reference pictures (default: the captions, drawn)",
               metavar="DIR"),
)  # fmt: skip
_GROUPS = {
    "model": (*flags.MODEL, next(f for f in flags.METHOD if f.name == "config")),
    "search": _SEARCH,
    "guidance": _GUIDANCE,
    "objectives": _SCORERS,
    "prompt": flags.without(flags.PROMPT, "image"),
    "size": flags.SIZE,
    "sampling": flags.without(flags.SAMPLING, "num-images-per-prompt", "guidance-scale"),
    "machine": flags.without(flags.MACHINE, "compile"),
    "output": flags.without(flags.OUTPUT, "contact-sheet", "fps"),
}
_EXAMPLES = """examples:
  dit-attn search --model tiny-image --objective clip-world --rounds 2 --per-round 2 --pairs 4 --held-out 4
  dit-attn search --model tiny-image --strategy halving --objective verifier --pairs 16
  dit-attn search --model stabilityai/stable-diffusion-3-medium-diffusers --objective pickscore \\
      --weights PickScore_v1 --prompts prompts.txt --steps 20 --dry-run
  accelerate launch --num-processes 8 -m dit_attn search --model ...
"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Register ``search`` and return its parser."""
    parser = subparsers.add_parser(
        "search",
        help="find the attention heads whose perturbation raises an objective",
        description="Try every attention head, round by round, and write heads.json, which "
        f"`--method softpag --set heads=FILE` takes, and {PAGE}. Every outcome is kept as it comes (--resume).",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for title, group in _GROUPS.items():
        flags.add_flags(parser, title, group)
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Check everything, load once, search, write. Returns 0, or 130 after Ctrl-C.

    Raises:
        DitAttnError: bad input, before anything is loaded where that can be known.
    """
    options = merged_options(args)
    from dit_attn.cli import load_pipeline, model_source
    from dit_attn.cli.commands.search import run as search_run

    device = load_pipeline.pick_device(options.get("device", "auto"))
    load_pipeline.check_machine(options, device)
    load_pipeline.parse_loras(options.get("lora", []))
    load_pipeline.quiet(False)
    model = model_source.describe(options["model"], options.get("revision"))
    if model.transformer is None:
        raise DitAttnError(
            f"{model.pipeline.__name__} of {model.name} has no diffusion transformer, so it has no heads to search"
        )
    pairs, call = pairs_of(options, model)
    setting = search_run.new_setting(options, model, pairs, call, device, args.argv)
    if options.get("dry_run"):
        plan = search_run.plan(setting)
        print(json.dumps(plan, indent=1) if options.get("json") else search_run.plan_text(plan))
        return 0
    try:
        found = search_run.run_all(setting)
    except KeyboardInterrupt:
        print(
            f"dit-attn: interrupted; every finished outcome is in {setting.folder}; run the same command with "
            "--resume to go on",
            file=sys.stderr,
        )
        return 130
    if found is not None:
        shown = {"folder": str(setting.folder), **found.to_dict()}
        print(json.dumps(shown, indent=1) if options.get("json") else search_run.table(found, setting))
    return 0


def merged_options(args: argparse.Namespace) -> dict[str, Any]:
    """The flags over the configuration file.

    Raises:
        DitAttnError: no model, or a bad file.
    """
    given = {key: value for key, value in vars(args).items() if key not in ("command", "run", "argv")}
    known = [flag for group in _GROUPS.values() for flag in group]
    config = flags.read_config(given["config"], known) if "config" in given else {}
    for key in ("method", "set"):
        if key in config:
            raise DitAttnError(f"{key} in {given['config']}: a search puts its own method on the model; leave it out")
    options = {**config, **given}
    if ("prompt" in given) != ("prompts" in given):
        options.pop("prompts" if "prompt" in given else "prompt", None)
    if "model" not in options:
        raise DitAttnError("no model; give --model NAME (`dit-attn models` lists the embedded ones)")
    if options.get("u", 1.0) <= 0.0:
        raise DitAttnError("--u must be above 0: a head of strength 0 is not perturbed, got 0")
    if options.get("scale", 1.0) <= 0.0:
        raise DitAttnError("--scale must be above 0: without a push all heads score the same, got 0")
    return options


def pairs_of(options: dict[str, Any], model: Source) -> tuple[list[Pair], dict[str, Any]]:
    """Pairs to search on and, behind them, those held out; and the arguments that all calls share.

    Raises:
        DitAttnError: no prompts for a model that is not embedded, fewer than wanted, or lines that differ in more than
            prompt and seed.
    """
    from dit_attn.cli import jobs as job_files
    from dit_attn.pipelines.head_search.evaluation import Pair

    held_out = options.get("held_out", 0)
    if "prompt" not in options and "prompts" not in options:
        captions = drawn(model, options.get("pairs", 4) + held_out, options.get("seed", 42))
        options = {**options, "prompt": captions}
    asked = {key: value for key, value in options.items() if key != "guidance_scale"}
    jobs = job_files.make_jobs({**asked, "num_images_per_prompt": 1}, model.defaults)
    wanted = options.get("pairs", len(jobs) - held_out) + held_out
    if wanted > len(jobs) or wanted - held_out < 1:
        raise DitAttnError(
            f"{max(wanted - held_out, 1)} --pairs and {held_out} --held-out need {max(wanted, held_out + 1)} prompts, "
            f"and there are {len(jobs)}; give more prompts or smaller numbers"
        )
    jobs = jobs[:wanted]
    other = next((job for job in jobs if job.call != jobs[0].call), None)
    if other is not None:
        raise DitAttnError(f"{other.where}: a search calls all prompts alike; a line may set prompt and seed alone")
    if jobs[0].pictures():
        raise DitAttnError("a search makes pictures and clips from prompts alone; leave out input pictures")
    job_files.check_calls(jobs, model.pipeline)
    return [Pair(job.prompt, job.seed) for job in jobs], jobs[0].call


def drawn(model: Source, count: int, seed: int) -> list[str]:
    """Captions for an embedded model that it was not trained on.

    Raises:
        DitAttnError: another model.
    """
    from dit_attn.eval.shapes_world import world

    if model.kind != "embedded":
        raise DitAttnError("no prompt; give --prompt TEXT or --prompts FILE")
    kind = "video" if "num_frames" in model.defaults else "image"
    return [world.caption(item) for item in world.held_out_sample(kind, count, seed)]


