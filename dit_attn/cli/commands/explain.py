"""``dit-attn explain``: what a method can gain on a model at a size, from configuration files alone."""

from __future__ import annotations

import argparse
import json
from typing import Any

from dit_attn.cli import options as flags

_GROUPS = {
    "model": flags.MODEL,
    "size": flags.SIZE,
    "output": tuple(flag for flag in flags.OUTPUT if flag.name == "json"),
}


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Register ``explain`` and return its parser."""
    parser = subparsers.add_parser(
        "explain",
        help="say what a method can gain on a model, before a run",
        description="Tokens, attention's share of the operations, the ceiling of the speed-up, and what will decline. "
        "Weights are neither downloaded nor loaded.",
    )
    for title, group in _GROUPS.items():
        flags.add_flags(parser, title, group)
    flags.add_method_flags(parser)
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Print the explanation. Returns 0.

    Raises:
        DitAttnError: unknown model, method or setting; a family without methods.
    """
    from dit_attn.cli.commands.generate import merged_options

    options, config = merged_options(args)
    import dit_attn
    from dit_attn.cli import load_pipeline, method_options, model_source

    wanted = method_options.wanted_methods(getattr(args, "words", []), config)
    load_pipeline.quiet(show_progress=False)
    model = model_source.describe(options["model"], options.get("revision"))
    chosen = method_options.resolve(wanted, model.transformer, options.get("preset"))
    size = {key: options.get(key, model.defaults.get(key)) for key in ("height", "width", "num_frames")}
    found = dit_attn.explain(model_source.skeleton(model), *chosen, **size)
    if options.get("json"):
        print(json.dumps({"model": model.name, **size, **found.to_dict()}, indent=1))
    else:
        print(f"{'model':<14} {model.name} ({model.pipeline.__name__})")
        print(found)
    return 0
