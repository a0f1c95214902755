"""``dit-attn explain``: what a method can gain on a model at a size, from configuration files alone."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dit_attn.cli import high_resolution
from dit_attn.cli import options as flags
from dit_attn.cli import parser as parsers
from dit_attn.cli.built_in_shape import BuiltInShape
from dit_attn.cli.early_check import check_early
from dit_attn.cli.model_source import offline_shape
from dit_attn.cli.progress import loading_libraries
from dit_attn.cli.table import show

if TYPE_CHECKING:
    from dit_attn.pipelines.high_resolution import HighResolution
    from dit_attn.processors.methods.base import Method

GROUPS = {
    "model": flags.MODEL,
    "methods": flags.PRESET,
    "size": flags.SIZE,
    "sampling": flags.only(flags.SAMPLING, "steps", "guidance-scale"),
    "high resolution": high_resolution.FLAGS,
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
        model: name of the model.
        about: its pipeline, or whose built-in shape it is.
        target: the pipeline without weights, or the transformer.
        methods: what is explained.
        height, width, num_frames: size in pixels and frames; ``None``: the model's own.
        steps: denoising steps; ``None``: the model's own.
        json: print JSON.
        stages: explain two stages: the procedure, and (height, width) of its native pass.
        guided: whether the run has classifier-free guidance.
    """

    model: str
    about: str
    target: Any
    methods: tuple[Method, ...]
    height: int | None
    width: int | None
    num_frames: int | None
    steps: int | None
    json: bool = False
    stages: tuple[HighResolution, tuple[int, int]] | None = None
    guided: bool = True

    @classmethod
    def from_options(cls, options: flags.Options) -> ExplainConfig:
        """Check the flags.

        Raises:
            DitAttnError: unknown model, method or setting; a Hub model that is neither there nor known here.
        """
        from dit_attn.cli import load_pipeline, method_options, model_source, resolve_methods

        specs = method_options.method_specs(options)
        shape = offline_shape(options["model"], options.get("revision"), options.get("variant"))
        with loading_libraries(not options.get("json")):
            load_pipeline.quiet(show_progress=False)
            if shape is None:
                place = options["model"], options.get("revision"), options.get("variant")
                source = model_source.describe(*place, modular=True)
                known, stand_in = source.defaults, source.transformer
                about, target = source.pipeline.__name__, source.without_weights
            else:
                stand_in, target, known = _built_in(shape)
                about = f"offline: built-in shape of {shape.title}"
        methods = resolve_methods.resolve(specs, stand_in, options.get("preset"))
        size = {name: options.get(name, known.get(name)) for name in ("height", "width", "num_frames")}
        steps = options.get("steps", known.get("num_inference_steps"))
        stages = None
        if options.get("high_resolution"):
            stages = high_resolution.explained(options, target, known, methods)
        guided = options.get("guidance_scale", 2.0) > 1.0
        rest = {"steps": steps, "stages": stages, "guided": guided, **options.pick("json")}
        return cls(options["model"], about, target, methods, **size, **rest)


def _built_in(shape: BuiltInShape) -> tuple[Any, Any, dict[str, int]]:
    """What presets know the transformer by, the transformer without weights, and the size it is used at."""
    from accelerate import init_empty_weights

    from dit_attn.models.architectures import architecture

    row = architecture(shape.config)
    with init_empty_weights():
        model = row.build_class()(**row.config)
    return row.stand_in, model, dict(zip(("num_frames", "height", "width"), row.pixels))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``explain``."""
    parsers.describe(
        parser,
        "explain --model NAME [--method NAME] [options]",
        "Print tokens, attention's share of the operations, the largest possible speed-up, and which calls will fall "
        "back to stock attention. Weights are neither downloaded nor loaded; without a network, shapes of well-known "
        "models are built in.",
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
    high_resolution.check_flags(options)
    check_early(options, reachable=False, together=True)
    config = ExplainConfig.from_options(options)
    size = {"height": config.height, "width": config.width, "num_frames": config.num_frames}
    if config.stages is None:
        found: Any = dit_attn.explain(config.target, *config.methods, **size, num_inference_steps=config.steps)
    else:
        make, native = config.stages
        large: dict[str, Any] = {**size, "num_inference_steps": config.steps}
        found = make.explain(**large, native=native, guided=config.guided)
    if config.json:
        print(json.dumps({"model": config.model, "about": config.about, **size, **found.to_dict()}, indent=1))
    else:
        show(f"{'model':<14} {config.model} ({config.about})", str(found))
    return 0
