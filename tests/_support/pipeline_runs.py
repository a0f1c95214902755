"""Whole runs of stock pipelines around tiny random transformers, of one sample or of two."""

from __future__ import annotations

import copy
from typing import Any

import torch

_SECOND_AXIS = ("prompt_embeds_llama3", "negative_prompt_embeds_llama3")


def real(case: Any) -> tuple[Any, dict[str, Any]]:
    """The pipeline of a family's test class and the arguments of a call, with guidance and one sample."""
    torch.manual_seed(0)
    pipe, kwargs = case().pipeline()
    pipe.set_progress_bar_config(disable=True)
    fill(pipe.transformer)
    return pipe, kwargs


def fill(transformer: torch.nn.Module) -> torch.nn.Module:
    """The transformer with weights where it has zeros: zero-initialised gates would hide the attention."""
    for parameter in transformer.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return transformer


def run(pipe: Any, kwargs: dict[str, Any], steps: int = 3, seeds: tuple[int, ...] = (0,), **more: Any) -> torch.Tensor:
    """Latents of a run; one seed for every sample."""
    noise = [torch.Generator().manual_seed(seed) for seed in seeds]
    with torch.no_grad():
        return pipe(
            **copy.deepcopy({**kwargs, **more}), num_inference_steps=steps,
            generator=noise if len(noise) > 1 else noise[0], output_type="latent", return_dict=False,
        )[0]  # fmt: skip


def two(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call of two samples: the embeddings as they are, and turned round."""

    def both(name: str, value: Any) -> Any:
        if isinstance(value, list):
            return [value[0], value[0].flip(-1)]
        if not isinstance(value, torch.Tensor):
            return value
        other = value.flip(-1) if value.is_floating_point() else value
        return torch.cat([value, other], 1 if name in _SECOND_AXIS else 0)

    return {name: both(name, value) for name, value in kwargs.items()}


def alone(kwargs: dict[str, Any], index: int) -> dict[str, Any]:
    """The arguments of one sample of :func:`two`."""

    def one(name: str, value: Any) -> Any:
        if isinstance(value, list):
            return [value[index]]
        if not isinstance(value, torch.Tensor):
            return value
        return value[:, index : index + 1] if name in _SECOND_AXIS else value[index : index + 1]

    return {name: one(name, value) for name, value in two(kwargs).items()}


def without_cfg(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call without classifier-free guidance."""
    scales = [name for name in kwargs if name in ("true_cfg_scale", "guidance_scale", "audio_guidance_scale")]
    return {**kwargs, **dict.fromkeys(scales, 1.0)}


def hooks(model: torch.nn.Module) -> list[Any]:
    """Every forward hook in a model."""
    return [hook for m in model.modules() for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
