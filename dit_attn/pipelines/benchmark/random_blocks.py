"""Attention calls of real transformer blocks with random weights, on latents with the structure of images."""

from __future__ import annotations

import math
from typing import Any

import torch

from dit_attn.api import observing, run_context
from dit_attn.kernels.benchmark.synthetic import Grid, Structure, blurred
from dit_attn.models.architecture import Architecture
from dit_attn.models.architectures import architecture
from dit_attn.pipelines.benchmark.operator_error import CallSource, Observer

LAYERS = 2
_LOOKS = Structure()


def wan_blocks(grid: Grid, heads: int | None = None) -> Architecture:
    """Return the first blocks of Wan 2.1 1.3B for a grid.

    Args:
        grid: (T, H, W) visual tokens.
        heads: of a layer; ``None``: all 12.
    """
    frames, height, width = grid
    published = architecture("wan2.1-1.3b")
    side, sized = published.token_pixels, published.sized(layers=LAYERS, heads=heads)
    return sized.at(1 + (frames - 1) * published.latent_frames, height * side, width * side)


def wan_source(arch: Architecture, *, steps: int = 8, seed: int = 0) -> CallSource:
    """Return runs of Wan blocks: their projections, norms of q and k, and rotary embedding are the model's.

    Latents vary smoothly and turn slowly from step to step, as in
    :mod:`~dit_attn.kernels.benchmark.synthetic`. Random weights alone give logits with a standard deviation of 1, less
    than those of trained models: the weight of the norm of q is raised to the sharpness of the synthetic fields.

    Args:
        arch: see :func:`wan_blocks`.
        steps: denoising steps of a run.
        seed: of the first run, weights included; run n has ``seed + n``.
    """

    def source(run: int, observer: Observer) -> None:
        model: Any = arch.build(torch.device("cpu"), torch.float32, seed + run)
        for block in model.blocks:
            block.attn1.norm_q.weight.mul_(_LOOKS.sharpness)
        call = arch.call(torch.device("cpu"), torch.float32, seed=seed + run)
        shape = call["hidden_states"].shape[1:]
        generator = torch.Generator().manual_seed(seed + run)
        side = 2.0 * _LOOKS.smooth  # a token is two latents wide
        now, then = (blurred(torch.randn(shape, generator=generator), side) for _ in range(2))
        own = math.sqrt(_LOOKS.noise) * torch.randn(shape, generator=generator)
        with observing(model, observer):
            for step in range(steps):
                smooth = math.cos(_LOOKS.turn * step) * now + math.sin(_LOOKS.turn * step) * then
                call["hidden_states"] = (math.sqrt(1.0 - _LOOKS.noise) * smooth + own)[None]
                with run_context(model, step=step, steps=steps, branch="cond"):
                    model(**call, return_dict=False)

    return source
