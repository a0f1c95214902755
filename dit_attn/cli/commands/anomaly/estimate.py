"""The estimate of ``dit-attn anomaly train`` and ``generate``: configuration files in, no weights."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from dit_attn import files
from dit_attn.cli.built_in_shape import BuiltInShape, built_in_shape
from dit_attn.cli.commands.anomaly import timings
from dit_attn.cli.model_source import Source, component, offline_shape
from dit_attn.cli.options import Options
from dit_attn.cli.progress import loading_libraries, on_terminal
from dit_attn.cli.workers import process_rank
from dit_attn.errors import DitAttnError

# Pipeline: the tokenizer that decides how long prompts are, its length, and tokens of others.
_TEXTS = {
    "PixArtAlphaPipeline": ("tokenizer", 120, 0),
    "PixArtSigmaPipeline": ("tokenizer", 300, 0),
    "StableDiffusion3Pipeline": ("tokenizer_3", 256, 77),
    "FluxPipeline": ("tokenizer_2", 512, 0),
    "QwenImagePipeline": ("", 64, 0),
}
_T5_XXL, _CLIP_L = 4_762_310_656, 123_060_480  # parameters of the encoders, by their published configurations
# Built-in shape: pipeline, scheduler, channels of the latents, parameters of the text encoders.
_BUILT_IN = {
    "flux": ("FluxPipeline", "FlowMatchEulerDiscreteScheduler", 16, _T5_XXL + _CLIP_L),
    "pixart-sigma": ("PixArtSigmaPipeline", "DPMSolverMultistepScheduler", 4, _T5_XXL),
}


def check_model(options: Options) -> None:
    """Refuse a model that is neither there nor among the built-in shapes.

    Raises:
        DitAttnError: so it is.
    """
    _offline_shape(options)


def show(options: Options, job: Callable[[Any], Any]) -> int:
    """Print an estimate, in the first process; returns 0.

    Args:
        options: the flags.
        job: the estimate of a :class:`~dit_attn.pipelines.anomaly.estimate.ModelShape`.
    """
    if process_rank()[0]:
        return 0
    with loading_libraries(not options.get("json")):
        found = job(shape_of(options))
    print(json.dumps(found.to_dict(), indent=1) if options.get("json") else found)
    return 0


def before(options: Options, job: Callable[[Any], Any]) -> None:
    """Print an estimate on standard error before a run, where somebody watches; a run goes on without one."""
    if not on_terminal():
        return
    text = ""
    with loading_libraries(), suppress(Exception):  # what is wrong with the model is said when it is loaded
        text = f"{job(shape_of(options))}\n"
    if text:
        print(text, file=sys.stderr)


def of_training(shape: Any, options: Options, config: Any, pairs: int) -> Any:
    """Return the estimate of ``anomaly train``.

    Args:
        shape: of :func:`shape_of`.
        options: the flags.
        config: how a concept is learned.
        pairs: number of (product, defect) pairs.
    """
    from dit_attn.pipelines.anomaly.estimate import estimate_training

    found = estimate_training(shape, config, pairs, process_rank()[1], bool(options.get("gradient_checkpointing")))
    return _timed(found, options, config.batch, config.steps)


def of_pairs(shape: Any, options: Options, config: Any, count: int, concept: Any = None) -> Any:
    """Return the estimate of ``anomaly generate``.

    Args:
        shape: of :func:`shape_of`.
        options: the flags.
        config: how pairs are made.
        count: of pairs.
        concept: settings of the concept; ``None`` for one of the usual size.
    """
    from dit_attn.pipelines.anomaly.concept import ConceptSettings
    from dit_attn.pipelines.anomaly.estimate import estimate_generation

    if concept is not None and "resolution" not in options:
        shape = replace(shape, resolution=concept.resolution)
    found = estimate_generation(shape, config, concept or ConceptSettings("", "", 0, 0, ()))
    return _timed(found, options, config.batch, count)


def _timed(found: Any, options: Options, batch: int, count: int) -> Any:
    """Add the time of a run, where this machine has been timed on the same model and settings."""
    each = timings.read(timings.key_of(found.job, options, found.resolution, batch, found.checkpointing))
    return found if each is None else replace(found, seconds=each * count)


def shape_of(options: Options) -> Any:
    """Read the shape of the model that the flags name.

    Raises:
        DitAttnError: there is no such model, or anomalies are not there yet for it.
    """
    from dit_attn.cli.load_pipeline import pick_device, quiet

    built_in = _offline_shape(options)
    quiet(show_progress=False)
    device = pick_device(options.get("device", "auto"))
    return _read(options, device) if built_in is None else _known(options, built_in, device)


def _offline_shape(options: Options) -> BuiltInShape | None:
    """The built-in shape of a Hub model that cannot be read, ``None`` for what can be."""
    if (named := built_in_shape(options["model"])) is not None and "/" not in options["model"]:
        return named if named.config in _BUILT_IN else None
    return offline_shape(options["model"], options.get("revision"), options.get("variant"), _BUILT_IN)


def _read(options: Options, device: Any) -> Any:
    import diffusers

    from dit_attn.cli.load_pipeline import pick_dtype
    from dit_attn.cli.model_source import describe
    from dit_attn.pipelines.anomaly.backbone import FAMILIES
    from dit_attn.pipelines.anomaly.estimate import ModelShape

    source = describe(options["model"], options.get("revision"), options.get("variant"))
    name = source.pipeline.__name__
    if name not in FAMILIES:
        raise DitAttnError(f"anomalies are not there yet for {name}; they are for {', '.join(sorted(FAMILIES))}")
    pipe = source.without_weights
    kind = getattr(diffusers, str(component(source.components, "scheduler")[1]))
    pipe.__dict__["scheduler"] = kind.from_config(
        kind.load_config(source.path, subfolder="scheduler", revision=source.revision)
    )
    size = options.get("resolution", source.defaults.get("height"))
    dtype = pick_dtype(options.get("dtype", "auto"), source, device)
    return ModelShape(pipe, dtype, _text_tokens(source), _text_encoders(source), name, size)


def _known(options: Options, built_in: BuiltInShape, device: Any) -> Any:
    import diffusers
    import torch

    from dit_attn.cli.load_pipeline import _DTYPES
    from dit_attn.models.architectures import architecture
    from dit_attn.pipelines.anomaly.estimate import ModelShape

    row = architecture(built_in.config)
    pipeline, scheduler, channels, text_encoders = _BUILT_IN[built_in.config]
    kind = getattr(diffusers, pipeline)
    pipe = kind.__new__(kind)
    with torch.device("meta"):
        transformer = row.build_class()(**row.config)
        vae = diffusers.AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=channels,
        )  # fmt: skip
    parts = {"transformer": transformer, "vae": vae, "scheduler": getattr(diffusers, scheduler)()}
    pipe.__dict__.update(parts, vae_scale_factor=8)
    default = "float32" if device.type == "cpu" else "bfloat16"
    dtype = getattr(torch, _DTYPES.get(options.get("dtype", "auto"), default))
    size = options.get("resolution", row.pixels[1])
    about = f"offline: built-in shape of {built_in.title}"
    return ModelShape(pipe, dtype, _TEXTS[pipeline][1], text_encoders, about, size)


def _text_tokens(source: Source) -> int:
    """Tokens of a prompt: what the pipeline asks for, or what its tokenizer takes at most."""
    tokenizer, length, others = _TEXTS[source.pipeline.__name__]
    try:
        if tokenizer in source.components:
            data = files.parse_json(_file(source, f"{tokenizer}/tokenizer_config.json"))
            length = min(length, int(data["model_max_length"]))
    except (OSError, ValueError, KeyError, TypeError):
        pass  # as long as the pipeline asks for
    return length + others


def _file(source: Source, name: str) -> bytes:
    if source.kind != "hub":
        return Path(source.path, name).read_bytes()
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(source.path, name, revision=source.revision)).read_bytes()


def _text_encoders(source: Source) -> int:
    """Parameters of the text encoders, by their configuration files."""
    import torch
    import transformers

    count = 0
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        library, kind = component(source.components, name)
        cls = getattr(transformers, str(kind), None) if library == "transformers" else None
        if cls is not None:
            config = cls.config_class.from_pretrained(source.path, subfolder=name, revision=source.revision)
            with torch.device("meta"):
                count += sum(p.numel() for p in cls(config).parameters())
    return count
