"""Captions of the shapes world, which most embedded models know."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def knows_shapes(kind: str, model: str) -> bool:
    """Return whether a model is embedded and draws the shapes world.

    Args:
        kind: of the model, see :class:`~dit_attn.cli.model_source.Source`.
        model: its name.
    """
    from dit_attn import models

    return kind == "embedded" and models.info(model).world == "shapes"


def caption_kind(defaults: Mapping[str, Any]) -> str:
    """Return what a model makes, ``"image"`` or ``"video"``, by the arguments its calls need."""
    return "video" if "num_frames" in defaults else "image"


def held_out_captions(defaults: Mapping[str, Any], count: int, seed: int = 0) -> list[str]:
    """Return so many different captions that no embedded model was trained on.

    Raises:
        DitAttnError: fewer exist.
    """
    from dit_attn.eval.shapes_world import world

    return [world.caption(item) for item in world.held_out_sample(caption_kind(defaults), count, seed)]


def shuffled_captions(defaults: Mapping[str, Any], held_out: bool, count: int) -> list[str]:
    """Return the first captions of a seeded order, of those in training or of those held out from it."""
    import torch

    from dit_attn.eval.shapes_world import world

    known = world.split(caption_kind(defaults))[held_out]
    order = torch.randperm(len(known), generator=torch.Generator().manual_seed(0)).tolist()
    return [world.caption(known[i]) for i in order[:count]]
