"""Find what a transformer gets for a negative prompt: the pipeline that is running encodes it as it does a prompt.

A copy of the pipeline is called with the negative prompt in the place of the prompt, without classifier-free guidance,
and stopped when it calls the transformer. Nothing of its templates, encoders and connectors is known here. The
pipeline, its scheduler and the random numbers of the run are not touched.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from dit_attn.errors import DitAttnError, reason
from dit_attn.processors.attach import batch, compat
from dit_attn.processors.attach.components import COMPONENTS, unwrap
from dit_attn.processors.attach.pipeline_call import argument_default, running_call
from dit_attn.processors.core.cfg import CFGRule

_CONTEXT = "dit_attn_negative"
# Arguments of a pipeline's call that belong to the run: its noise, its schedule, its output, its callbacks.
_OF_RUN = ("latents", "generator", "timesteps", "sigmas", "output", "return_dict", "callback", "state")
_OF_PROMPT = ("prompt", "pooled_prompt", "negative_")
_MADE_OF = ("_embeds", "_latents")  # "image_embeds" are made of "image"
_TENSORS = ("Tensor", "Image")  # annotations of arguments that may be tensors


class _Reached(Exception):
    """The pipeline has called the transformer."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        super().__init__()
        self.arguments = arguments


def negative_arguments(pipe: Any, prompt: str | None, rule: CFGRule, rows: int) -> dict[str, Any]:
    """Return the arguments that the transformer of a running pipeline would get for a negative prompt, by name.

    Args:
        pipe: the pipeline whose call is on the stack.
        prompt: the negative prompt; ``None`` for the one that the call was given.
        rule: how the family's pipelines do classifier-free guidance.
        rows: conditional rows of a call of the transformer.

    Raises:
        DitAttnError: there is no negative prompt, or the pipeline cannot encode it in this way.
    """
    call = running_call(pipe)
    if "prompt" not in call:
        raise DitAttnError(
            f"nag: {type(pipe).__name__} takes no prompt in its call; give the text of the negative prompt: "
            "session.given['nag']"
        )
    if prompt is None and call.get("negative_prompt") != argument_default(pipe, "negative_prompt"):
        prompt = call["negative_prompt"]
    if prompt is None:
        raise DitAttnError('nag: there is no negative prompt; give NAG(negative_prompt="blurry"), or one to the call')
    arguments = _arguments(pipe, call, prompt, rule, rows)
    models = [unwrap(part) for name in COMPONENTS if (part := getattr(pipe, name, None)) is not None]
    twin = copy.copy(pipe)
    for name in ("scheduler", "guider"):  # what counts steps and branches
        if hasattr(pipe, name):
            twin.__dict__[name] = copy.deepcopy(getattr(pipe, name))
    twin.__dict__["_progress_bar_config"] = {"disable": True}
    devices = [tensor.device for model in models for tensor in list(model.parameters())[:1] if tensor.is_cuda]
    try:
        with torch.random.fork_rng(devices), _stopped(models), _unlogged():
            twin(**arguments)
    except _Reached as reached:
        return reached.arguments
    except Exception as error:  # whatever a pipeline raises for arguments that it does not take
        raise DitAttnError(
            f"nag: {type(pipe).__name__} cannot encode the negative prompt while it runs ({reason(error)}); give its "
            "embeddings: session.given['nag']"
        ) from error
    raise DitAttnError(f"nag: {type(pipe).__name__} makes no step with the negative prompt alone")


def _arguments(pipe: Any, call: Mapping[str, Any], prompt: str | list[str], rule: CFGRule, rows: int) -> dict[str, Any]:
    """Arguments of a call with the negative prompt alone; those of ``call`` may have been changed by it since."""
    taken = inspect.signature(type(pipe).__call__).parameters
    found = {
        name: value
        for name, value in call.items()
        if ("template" in name or not name.startswith((*_OF_RUN, *_OF_PROMPT)))
        and not any(name.endswith(end) and call.get(name.removesuffix(end)) is not None for end in _MADE_OF)
        and (not isinstance(value, torch.Tensor) or any(kind in str(_annotation(taken, name)) for kind in _TENSORS))
    }
    each = call.get("num_images_per_prompt") or call.get("num_videos_per_prompt") or 1
    given = call["prompt"]
    count = len(given) if isinstance(given, list) else 1 if given is not None else rows // each
    several = isinstance(prompt, str) and (isinstance(given, list) or count > 1)
    found["prompt"] = [prompt] * count if several else prompt
    scale = rule.argument or "guidance_scale"
    return found | {name: rule.off for name in (scale, f"{scale}_2") if call.get(name) is not None}


def _annotation(taken: Mapping[str, inspect.Parameter], name: str) -> Any:
    """Type of an argument; modular pipelines do not say those of their inputs."""
    return taken[name].annotation if name in taken else "Tensor"


@contextmanager
def _unlogged() -> Iterator[None]:
    """Keep modular pipelines from logging that a block was stopped."""
    logger = logging.getLogger("diffusers.modular_pipelines.modular_pipeline")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


@contextmanager
def _stopped(models: list[torch.nn.Module]) -> Iterator[None]:
    """Let the next call of one of some transformers raise its arguments."""

    def stop(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _Reached(batch.by_name(module, args, kwargs))

    with ExitStack() as stack:
        for model in models:
            if hasattr(type(model), "cache_context"):
                stack.enter_context(compat.inner_cache_context(model, _CONTEXT))
            handle = model.register_forward_pre_hook(stop, prepend=True, with_kwargs=True)
            stack.callback(handle.remove)
        yield
