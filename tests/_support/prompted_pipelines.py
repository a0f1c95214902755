"""Stock pipelines around tiny transformers that encode their prompts with tiny real tokenizers."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from tests._support import tiny_tokenizers as kinds
from tests._support.pipeline_runs import fill, real
from tests._support.word_encoder import WordEncoder, WordEncoderWithProjection

Components = Callable[[int, int], dict[str, Any]]
PROMPT = "a small house, a red cube on the green grass"
PIECE, SWAPPED = "red cube", "cube red"


@dataclass(frozen=True)
class Prompted:
    """A pipeline of the family tests, and what it encodes with.

    Attributes:
        case: module and class of the family's tests.
        components: tokenizers and encoders, by the width of the embeddings and of pooled ones.
        more: other arguments of the call.
        config: changes of the transformer's configuration, where prompts are longer than the family's tests have.
        without_mixing: paths in the pipeline of modules that would mix tokens, made identities.
        constant: paths of modules that would carry all tokens into every row; their weights are 0.
        image_keys: keys of the cross attention that are of an image, before the text.
        joint: whether text is part of the sequence of the wrapped layers.
        prompt: has "red cube".
    """

    case: str
    components: Components
    more: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    without_mixing: tuple[str, ...] = ()
    constant: tuple[str, ...] = ()
    image_keys: int = 0
    joint: bool = True
    prompt: str = PROMPT


def one(tokenizer: Callable[[], Any], layers: int = 2) -> Components:
    """A tokenizer and its encoder."""
    return lambda size, pooled: {"tokenizer": tokenizer(), "text_encoder": WordEncoder(size, layers)}


def clip_and(tokenizer: Callable[[], Any], first: str = "") -> Components:
    """CLIP, pooled only, and another encoder; ``first`` is the suffix of the other."""
    clip, other = ("", "_2") if first == "_2" else ("_2", "")
    return lambda size, pooled: {
        f"tokenizer{clip}": kinds.clip(),
        f"text_encoder{clip}": WordEncoder(pooled),
        f"tokenizer{other}": tokenizer(),
        f"text_encoder{other}": WordEncoder(size),
    }


def sd3(size: int, pooled: int) -> dict[str, Any]:
    return {
        "tokenizer": kinds.clip(),
        "text_encoder": WordEncoderWithProjection(size // 2),
        "tokenizer_2": kinds.clip(),
        "text_encoder_2": WordEncoderWithProjection(size // 2),
        "tokenizer_3": kinds.t5(),
        "text_encoder_3": WordEncoder(size),
    }


def hidream(size: int, pooled: int) -> dict[str, Any]:
    return {
        **sd3(pooled, pooled),
        "text_encoder_3": WordEncoder(size),
        "tokenizer_4": kinds.llama3(),
        "text_encoder_4": WordEncoder(size, 2),
    }


def omnigen(size: int, pooled: int) -> dict[str, Any]:
    from diffusers.pipelines.omnigen.processor_omnigen import OmniGenMultiModalProcessor

    return {"multimodal_processor": OmniGenMultiModalProcessor(kinds.llama())}


def with_glyphs(size: int, pooled: int) -> dict[str, Any]:
    return {
        "tokenizer": kinds.qwen(),
        "text_encoder": WordEncoder(size, 4),
        "tokenizer_2": kinds.byt5(),
        "text_encoder_2": WordEncoder(8),
    }


def pipeline_of(prompted: Prompted) -> tuple[Any, dict[str, Any]]:
    """The pipeline of a case, and the arguments of a call without a prompt."""
    file, cls = prompted.case.split(".")
    pipe, kwargs = real(getattr(importlib.import_module(f"tests.families.test_{file}"), cls))
    size, pooled = 16, 16
    for key, value in kwargs.items():
        if "prompt_embeds" in key and "mask" not in key and not key.endswith("_2"):
            width = (value[0] if isinstance(value, list) else value).shape[-1]
            size, pooled = (size, width) if "pooled" in key or "clip" in key else (width, pooled)
    for key, part in prompted.components(size, pooled).items():
        setattr(pipe, key, part)
    if prompted.config:
        config = {**pipe.transformer.config, **prompted.config}
        pipe.transformer = fill(type(pipe.transformer).from_config(config).eval())
    for path in prompted.without_mixing:
        module = reach(pipe, path)
        for part in module if isinstance(module, torch.nn.ModuleList) else [module]:
            part.forward = lambda x, *args, **kwargs: x
    for path in prompted.constant:
        for parameter in reach(pipe, path).parameters():
            torch.nn.init.zeros_(parameter)
    kwargs = {key: value for key, value in kwargs.items() if "prompt" not in key}
    return pipe, {**kwargs, **prompted.more}


def reach(pipe: Any, path: str) -> Any:
    """A module of a pipeline, by its path."""
    component, _, rest = path.partition(".")
    return getattr(pipe, component).get_submodule(rest)
