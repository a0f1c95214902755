"""What the method ``auto`` will do in a run that has not been made."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from dit_attn.processors.attach.layer_shape import compute_device, compute_dtype, head_count, head_size
from dit_attn.processors.methods.auto import as_auto
from dit_attn.processors.methods.auto_choice import Decision, RunShape
from dit_attn.processors.methods.base import Grid, Method

TEXT_TOKENS = 512
"""Assumed length of the text in a joint sequence."""


def sequence_length(names: Sequence[str], tokens: int, text: int = TEXT_TOKENS) -> int:
    """Return the tokens of a self-attention call: with the text where it is joint attention.

    Args:
        names: of the layers.
        tokens: visual ones.
        text: those of the text.
    """
    return tokens if any(name.endswith("attn1") for name in names) else tokens + text


def run_device(model: torch.nn.Module) -> torch.device:
    """Return the device of a model's runs: of weights without a place a GPU, where there is one."""
    meta = next((weight.is_meta for weight in model.parameters()), False)
    return torch.device("cuda") if meta and torch.cuda.is_available() else compute_device(model)


def settle(
    model: torch.nn.Module,
    methods: Sequence[Method],
    names: Sequence[str],
    grid: Grid,
    steps: int,
    *,
    text: int = TEXT_TOKENS,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[tuple[Method, ...], Decision | None]:
    """Put what ``auto`` picks in its place; nothing where it picks dense attention.

    Args:
        model: the transformer; its weights may be on the meta device.
        methods: of the run.
        names: of its attention layers.
        grid: (T, H, W) visual tokens.
        steps: of the run.
        text: tokens of the text, where they are in the sequence.
        device, dtype: of the run; default: those of the model, of weights without a place a GPU where there is one.

    Returns:
        The methods, and the decision; ``None`` where no method leaves one.
    """
    auto = next(filter(None, map(as_auto, methods)), None)
    if auto is None or not names:
        return tuple(methods), None
    layer = model.get_submodule(names[0])
    device = device or run_device(model)
    visual = math.prod(grid)
    shape = RunShape(
        tokens=sequence_length(names, visual, text),
        grid=grid,
        visual=visual,
        heads=head_count(layer) or 1,
        head_dim=head_size(layer),
        dtype=str(dtype or compute_dtype(layer)).removeprefix("torch."),
        device=device.type,
        steps=steps,
        layers=len(names),
    )
    found = auto.decide(shape)
    others = [method for method in methods if method is not auto]
    return (*others, *([found.method] if found.method is not None else [])), found
