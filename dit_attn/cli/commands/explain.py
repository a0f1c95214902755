"""``dit-attn explain``: what a method can gain on a model at a size, from configuration files alone."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dit_attn.cli import options as flags
from dit_attn.cli import parser as parsers
from dit_attn.cli.early_check import check_early
from dit_attn.cli.progress import loading_libraries
from dit_attn.cli.table import show

if TYPE_CHECKING:
    from dit_attn.cli.model_source import Source
    from dit_attn.processors.methods.base import Method

GROUPS = {
    "model": flags.MODEL,
    "methods": flags.PRESET,
    "size": flags.SIZE,
    "output": flags.only(flags.OUTPUT, "json"),
    "run": flags.only(flags.RUN, "config"),
}
_EXAMPLES = """examples:
  dit-attn explain --model tiny-video --method block-sparse:density=0.25
  dit-attn explain --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers \\
      --height 480 --width 832 --num-frames 81 --method rectified-spaattn
"""


@dataclass(frozen=True)
class ExplainConfig:
    """One command, checked.

    Attributes:
        source: the model.
        methods: what is explained.
        height, width, num_frames: size in pixels and frames; ``None``: the model's own.
        json: print JSON.
    """

    source: Source
    methods: tuple[Method, ...]
    height: int | None
    width: int | None
    num_frames: int | None
    json: bool = False

    @classmethod
    def from_options(cls, options: flags.Options) -> ExplainConfig:
        """Check the flags.

        Raises:
            DitAttnError: unknown model, method or setting.
        """
        from dit_attn.cli import load_pipeline, method_options, model_source, resolve_methods

        specs = method_options.method_specs(options)
        with loading_libraries(not options.get("json")):
            load_pipeline.quiet(show_progress=False)
            source = model_source.describe(options["model"], options.get("revision"), options.get("variant"))
        methods = resolve_methods.resolve(specs, source.transformer, options.get("preset"))
        size = {key: options.get(key, source.defaults.get(key)) for key in ("height", "width", "num_frames")}
        return cls(source, methods, **size, **options.pick("json"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``explain``."""
    parsers.describe(
        parser,
        "explain --model NAME [--method NAME] [options]",
        "Print tokens, attention's share of the operations, the largest possible speed-up, and which calls will fall "
        "back to stock attention. Weights are neither downloaded nor loaded.",
        _EXAMPLES,
    )
    parsers.add_groups(parser, GROUPS, parsers.TOGETHER)


def run(args: argparse.Namespace) -> int:
    """Print the explanation. Returns 0.

    Raises:
        DitAttnError: unknown model, method or setting; a family without methods.
    """
    import dit_attn

    options = flags.merge(args, GROUPS)
    check_early(options)
    config = ExplainConfig.from_options(options)
    size = {"height": config.height, "width": config.width, "num_frames": config.num_frames}
    found = dit_attn.explain(config.source.without_weights, *config.methods, **size)
    if config.json:
        print(json.dumps({"model": config.source.name, **size, **found.to_dict()}, indent=1))
    else:
        show(f"{'model':<14} {config.source.name} ({config.source.pipeline.__name__})", str(found))
    return 0
