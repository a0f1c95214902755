"""Captions of the shapes world, of single shapes or of several different objects, which most embedded models know."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def knows_shapes(kind: str, model: str) -> bool:
    """Return whether a model is embedded and draws what the judge of the shapes world knows (``clip-world``).

    Args:
        kind: of the model, see :class:`~dit_attn.cli.model_source.Source`.
        model: its name.
    """
    from dit_attn import models

    return kind == "embedded" and models.info(model).world == "shapes"


def has_captions(kind: str, model: str) -> bool:
    """Return whether a model is embedded and draws captions of the shapes world; arguments of :func:`knows_shapes`."""
    from dit_attn import models

    return kind == "embedded" and models.info(model).world in ("shapes", "objects")


def caption_kind(defaults: Mapping[str, Any]) -> str:
    """Return what a model makes, ``"image"``, ``"video"`` or ``"multi"``, by the arguments its calls need."""
    from dit_attn.eval.shapes_world import multi

    if "num_frames" in defaults:
        return "video"
    return "multi" if defaults.get("max_sequence_length") == multi.TEXT_LENGTH else "image"


def held_out_captions(defaults: Mapping[str, Any], count: int, seed: int = 0) -> list[str]:
    """Return so many different captions that no embedded model was trained on.

    Raises:
        DitAttnError: fewer exist.
    """
    from dit_attn.eval.shapes_world import items

    return [items.caption(item) for item in items.held_out_sample(caption_kind(defaults), count, seed)]


def shuffled_captions(defaults: Mapping[str, Any], held_out: bool, count: int) -> list[str]:
    """Return the first captions of a seeded order, of those in training or of those held out from it."""
    import torch

    from dit_attn.eval.shapes_world import multi, world

    kind, generator = caption_kind(defaults), torch.Generator().manual_seed(0)
    if kind == "multi":  # too many to list
        scenes = multi.held_out_sample(count) if held_out else multi.sample_scenes(count, generator)
        return [multi.caption(scene) for scene in scenes]
    known = world.split(kind)[held_out]
    order = torch.randperm(len(known), generator=generator).tolist()
    return [world.caption(known[i]) for i in order[:count]]
