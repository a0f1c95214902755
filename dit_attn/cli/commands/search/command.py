"""``dit-attn search``: which attention heads to perturb, by an objective; a file, a page, and what it took."""

from __future__ import annotations

import argparse
import json
import sys

from dit_attn.cli import options as flags
from dit_attn.cli import parser as parsers
from dit_attn.cli.commands.search import early
from dit_attn.cli.progress import loading_libraries
from dit_attn.pipelines.run import JobFailed

OBJECTIVES = (
    "clip-world", "verifier", "verifier-whole", "fid-world", "drawn-world", "clip", "style", "pickscore", "hpsv2",
    "aesthetic",
)  # fmt: skip
STRATEGIES = ("greedy", "halving", "gradient")
_SEARCH = (
    flags.Flag("objective", "what to raise", default="clip-world for embedded models, else clip", choices=OBJECTIVES),
    flags.Flag("strategy", "greedy: every head on every pair (the paper); halving: successive halving; gradient: "
               "screened by one backward pass", default="greedy", choices=STRATEGIES, metavar="NAME"),
    flags.Flag("rounds", "number of rounds", int, "3", low=1, high=10_000),
    flags.Flag("per-round", "heads that join in a round", int, "3", low=1, high=10_000),
    flags.Flag("pairs", "pairs of prompt and seed to search on", int, "all prompts; 4 captions without any", low=1,
               high=100_000),
    flags.Flag("held-out", "further pairs to check on, never searched on", int, "0", low=0, high=100_000),
    flags.Flag("controls", "random sets of as many heads to check, as a baseline", int, "1", low=0, high=1000),
    flags.Flag("layers", "also check every full layer (layer-level PAG)", bool),
    flags.Flag("tune", "sweeps over the strengths of the found heads", int, "0", low=0, high=100),
    flags.Flag("search-steps", "denoising steps of candidates: fewer are cheaper", int, "those of the run", low=1,
               high=100_000),
    flags.Flag("keep", "halving: a rung keeps one head of so many", float, "4", low=1.1, high=1000.0),
    flags.Flag("screen", "gradient: share of the heads that is then measured fully", float, "0.15", low=1e-6, high=1.0),
    flags.Flag("batch", "pairs in one call of the pipeline", int, "4", low=1, high=4096),
)  # fmt: skip
_GUIDANCE = (
    flags.Flag("scale", "guidance scale w of the perturbed pass", float, "3", low=0.0, high=1e6),
    flags.Flag("u", "strength of a perturbed head, 0 to 1", float, "1", low=0.0, high=1.0),
    flags.Flag("target", "replacement for a head's attention matrix", default="identity",
               choices=("identity", "uniform", "mean-query"), metavar="NAME"),
    flags.Flag("joint", "what the identity means on a joint sequence", default="joint",
               choices=("joint", "image-rows", "ii-logit-mask", "ii-mass-to-diagonal"), metavar="NAME"),
    flags.Flag("guidance-scale", "classifier-free guidance scale during the search; 1 is none", float, "1", low=0.0),
)  # fmt: skip
_SCORERS = (
    flags.Flag("style", "objective style: words in front of every prompt", metavar="TEXT"),
    flags.Flag("clip", "objectives clip and style: CLIP model, folder or Hub name, or clip-world",
               default="openai/clip-vit-large-patch14"),
    flags.Flag("weights", "objectives pickscore, hpsv2, aesthetic: folder of the scorer", metavar="DIR", exists=True),
    flags.Flag("weights-head", "objective aesthetic: file with the layers on top", metavar="FILE",
               exists=True),
    flags.Flag("reference", "objective fid-world: folder of reference images", default="the captions, drawn",
               metavar="DIR", exists=True),
)  # fmt: skip
GROUPS = {
    "model": (*flags.MODEL, *flags.WEIGHTS),
    "methods": (),
    "search": _SEARCH,
    "guidance": _GUIDANCE,
    "objectives": _SCORERS,
    "prompts": flags.without(flags.PROMPT, "image"),
    "size": flags.SIZE,
    "sampling": flags.without(flags.SAMPLING, "num-images-per-prompt", "guidance-scale"),
    "output": flags.without(flags.OUTPUT, "contact-sheet", "fps"),
    "run": flags.without(flags.RUN, "compile"),
    "workers": flags.WORKERS,
}
_METHOD = (
    "the method whose heads are searched; its settings scale, u, target and joint are the flags of these names "
    "(default: softpag)"
)
_EXAMPLES = """examples:
  dit-attn search --model tiny-image --objective clip-world --rounds 2 \\
      --per-round 2 --pairs 4 --held-out 4
  dit-attn search --model tiny-image --strategy halving --pairs 16 \\
      --objective verifier --method softpag:scale=2
  dit-attn search --model stabilityai/stable-diffusion-3-medium-diffusers \\
      --objective pickscore --weights PickScore_v1 --prompts prompts.txt \\
      --steps 20 --dry-run
  dit-attn search --model org/name --prompts prompts.txt --workers auto
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``search``."""
    parsers.describe(
        parser,
        "search --model NAME [--objective NAME] [options]",
        "Try every attention head, round by round, and write heads.json, which "
        "`--method softpag:heads=FILE` takes, and search.html. Every score is written as it comes (--resume).",
        _EXAMPLES,
    )
    parsers.add_groups(parser, GROUPS, _METHOD)


def run(args: argparse.Namespace) -> int:
    """Check everything, load once, search, write.

    Returns:
        0, 1 where workers could not score a candidate, or 130 after Ctrl-C.

    Raises:
        DitAttnError: bad input, before anything is loaded where that can be known.
    """
    options = flags.merge(args, GROUPS)
    early.check(options)
    with loading_libraries(not options.get("json")):
        from dit_attn.cli.commands.search import plan
        from dit_attn.cli.commands.search import run as search_run
        from dit_attn.cli.commands.search.config import HeadSearchConfig

    config = HeadSearchConfig.from_options(options)
    if config.dry_run:
        described = plan.describe(config)
        if config.json:
            print(json.dumps(described, indent=1))
        else:
            plan.show_plan(described)
        return 0
    saved = f"every finished score is in {config.folder}; run the same command with --resume to go on"
    try:
        found = search_run.run_all(config)
    except KeyboardInterrupt:
        print(f"dit-attn: interrupted; {saved}", file=sys.stderr)
        return 130
    except JobFailed as error:
        print(f"dit-attn: a candidate failed: {error}; {saved}", file=sys.stderr)
        return 1
    if found is None:
        return 0
    if config.json:
        print(json.dumps({"folder": str(config.folder), **found.to_dict()}, indent=1))
    else:
        search_run.show_result(found, config.folder)
    return 0
