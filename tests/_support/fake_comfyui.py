"""The part of ComfyUI that custom nodes touch, written from its contract: a model patcher, a sampler, a small model.

``make test-comfyui`` runs the same nodes in the real program.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F

SIGMAS = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0])


def wrapped(func: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """An attention function that an override in the options replaces."""

    @functools.wraps(func)
    def attention(*args: Any, **kwargs: Any) -> torch.Tensor:
        if "_inside_attn_wrapper" in kwargs:
            return func(*args, **kwargs)
        kwargs["_inside_attn_wrapper"] = True
        override = (kwargs.get("transformer_options") or {}).get("optimized_attention_override")
        return func(*args, **kwargs) if override is None else override(func, *args, **kwargs)

    return attention


@wrapped
def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, mask: torch.Tensor | None = None,
    attn_precision: Any = None, skip_reshape: bool = False, skip_output_reshape: bool = False, **kwargs: Any,
) -> torch.Tensor:  # fmt: skip
    """Stock attention."""
    if not skip_reshape:
        q, k, v = (x.unflatten(-1, (-1, q.shape[-1] // heads)).transpose(1, 2) for x in (q, k, v))
    if mask is not None and mask.ndim < 4:
        mask = mask[None, None] if mask.ndim == 2 else mask[:, None]
    gqa = {"enable_gqa": True} if kwargs.get("enable_gqa") else {}
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=kwargs.get("scale"), **gqa)
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


class FakeModel(torch.nn.Module):
    """Blocks of self attention, and of cross attention to the text.

    Attributes:
        mask: of the self attention.
        layout: ``wan`` (says its grid) or ``joint`` (text and image in one sequence, says where the image is).
        silent: first blocks of a joint model that do not say it.
    """

    patch_size = (1, 2, 2)

    def __init__(self, layers: int = 2, heads: int = 2, width: int = 20) -> None:
        super().__init__()
        self.heads, self.layout, self.mask, self.silent = heads, "wan", None, 0
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(heads * width, 3 * heads * width) for _ in range(layers))
        self.wide = torch.nn.Linear(16, heads * width)
        self.narrow = torch.nn.Linear(heads * width, 16)

    def forward(self, x: torch.Tensor, context: torch.Tensor, transformer_options: dict[str, Any]) -> torch.Tensor:
        """Predict from latents (B, 4, T, H, W) and text (B, L, 16)."""
        b, _, t, h, w = x.shape
        options, grid = transformer_options, (t, h // 2, w // 2)
        tokens = x.reshape(b, 4, t, h // 2, 2, w // 2, 2).permute(0, 2, 3, 5, 1, 4, 6).reshape(b, math.prod(grid), 16)
        text, tokens = self.wide(context), self.wide(tokens)
        if self.layout == "joint":
            tokens = torch.cat([text, tokens], 1)
        else:
            options["grid_sizes"] = torch.Size(grid)
        options["block_type"], options["total_blocks"] = "double", len(self.blocks)
        for index, block in enumerate(self.blocks):
            options["block_index"] = index
            if self.layout == "joint" and index >= self.silent:
                options["img_slice"] = [text.shape[1], tokens.shape[1]]
            q, k, v = block(tokens).chunk(3, -1)
            tokens = tokens + attention(q, k, v, self.heads, mask=self.mask, transformer_options=options)
            if self.layout == "wan":
                tokens = tokens + attention(tokens, text, text, self.heads, transformer_options=options)
        out = self.narrow(tokens[:, -math.prod(grid) :])
        return out.reshape(b, t, h // 2, w // 2, 4, 2, 2).permute(0, 4, 1, 2, 5, 3, 6).reshape(x.shape)


class FakePatcher:
    """A model with options, callbacks and wrappers; ``clone`` shares the weights."""

    def __init__(self, model: FakeModel) -> None:
        self.model = model
        self.model_options: dict[str, Any] = {"transformer_options": {}}
        self.callbacks: dict[str, dict[str, list[Any]]] = {}
        self.wrappers: dict[str, dict[str, list[Any]]] = {}

    def clone(self) -> FakePatcher:
        found = FakePatcher(self.model)
        found.model_options = copied(self.model_options)
        found.callbacks, found.wrappers = copied(self.callbacks), copied(self.wrappers)
        return found

    def get_model_object(self, name: str) -> Any:
        sampling = SimpleNamespace(percent_to_sigma=lambda percent: 1.0 - percent)
        return {"diffusion_model": self.model, "model_sampling": sampling}[name]

    def add_callback_with_key(self, kind: str, key: str, callback: Any) -> None:
        self.callbacks.setdefault(kind, {}).setdefault(key, []).append(callback)

    def add_wrapper_with_key(self, kind: str, key: str, wrapper: Any) -> None:
        self.wrappers.setdefault(kind, {}).setdefault(key, []).append(wrapper)

    def remove_callbacks_with_key(self, kind: str, key: str) -> None:
        self.callbacks.get(kind, {}).pop(key, None)

    def remove_wrappers_with_key(self, kind: str, key: str) -> None:
        self.wrappers.get(kind, {}).pop(key, None)

    def set_model_sampler_post_cfg_function(self, function: Any) -> None:
        self.model_options.setdefault("sampler_post_cfg_function", []).append(function)

    def call(self, kind: str, *args: Any) -> None:
        for callback in [each for found in self.callbacks.get(kind, {}).values() for each in found]:
            callback(self, *args)


def copied(value: Any) -> Any:
    """Dictionaries and lists copied, everything else shared."""
    if isinstance(value, dict):
        return {name: copied(each) for name, each in value.items()}
    return [copied(each) for each in value] if isinstance(value, list) else value


class Executor:
    """A chain of wrappers around the model's forward."""

    def __init__(self, original: Any, model: Any, wrappers: list[Any]) -> None:
        self.original, self.class_obj, self.wrappers = original, model, wrappers

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.wrappers:
            return self.original(*args, **kwargs)
        return self.wrappers[0](Executor(self.original, self.class_obj, self.wrappers[1:]), *args, **kwargs)


def calc_cond_batch(
    model: FakePatcher, conds: list[Any], x: torch.Tensor, sigma: torch.Tensor, model_options: dict[str, Any]
) -> list[torch.Tensor]:
    """Denoised latents of every conditioning, ``(uuid, text)``, all of them in one call of the model."""
    model.call("on_prepare_state", sigma, *((model_options,) if model.newer else ()))
    options = copied(model_options["transformer_options"])
    numbers = list(range(len(conds)))
    options |= {"cond_or_uncond": numbers, "uuids": [uuid for uuid, _ in conds], "sigmas": sigma}
    chain = [each for found in model.wrappers.get("diffusion_model", {}).values() for each in found]
    run = Executor(model.model, model.model, chain)
    rows = torch.cat([x] * len(conds)), torch.cat([text for _, text in conds])
    out = run(*rows, transformer_options=options)
    return [x - sigma * each for each in out.chunk(len(conds))]


def sample(
    patcher: FakePatcher, x: torch.Tensor, conds: list[Any], scale: float = 3.0, later: Any = None, newer: bool = True
) -> torch.Tensor:
    """Latents of an Euler run.

    Args:
        patcher: the model.
        x: noise (B, 4, T, H, W).
        conds: with the prompt, and without.
        scale: of classifier-free guidance.
        later: called with the options of the run once it has begun, as another node may change them.
        newer: whether callbacks get the options of the model, as in ComfyUI 0.35.
    """
    patcher.newer = newer
    options = copied(patcher.model_options)
    options["transformer_options"]["sample_sigmas"] = SIGMAS
    patcher.call("on_pre_run")
    if later is not None:
        later(options)
    try:
        for sigma, following in pairwise(SIGMAS):
            cond, uncond = calc_cond_batch(patcher, conds, x, sigma[None], options)
            denoised = uncond + scale * (cond - uncond)
            for function in options.get("sampler_post_cfg_function", []):
                args = {"denoised": denoised, "cond_denoised": cond, "cond": conds[0], "sigma": sigma[None], "input": x}
                denoised = function({**args, "model": patcher, "model_options": options})
            x = denoised + (x - denoised) / sigma * following
    finally:
        patcher.call("on_cleanup")
    return x
