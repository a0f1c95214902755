"""Measure over-saturation and artifacts: by the rules of the shapes world, and for other prompts against dense."""

from __future__ import annotations

import numpy as np

from dit_attn.errors import DitAttnError
from dit_attn.eval.shapes_world import artifacts, items, multi

PALETTE, AGAINST = "palette of the shapes world", "against dense"


def is_world_caption(caption: str | None) -> bool:
    """Return whether a text is a caption of the shapes world, whose objects have one color each: no fill words."""
    try:
        item = items.parse(caption or "")
    except DitAttnError:
        return False
    return not (isinstance(item, multi.MultiScene) and item.filled)


def saturation(frames: np.ndarray, dense: np.ndarray | None, caption: str | None) -> float:
    """Return the fraction of over-saturated pixels among the colored ones.

    See :func:`dit_attn.eval.shapes_world.artifacts.oversaturated`.

    Args:
        frames: (F, H, W, 3) uint8.
        dense: the same without a method; it bounds the colors where the caption is not of the shapes world.
        caption: the prompt.
    """
    return artifacts.oversaturated(frames, None if dense is None or is_world_caption(caption) else dense)


def artifact_rate(frames: np.ndarray, caption: str) -> float:
    """Return the fraction of frames with an artifact (:func:`dit_attn.eval.shapes_world.artifacts.artifact_rate`).

    Args:
        frames: (F, H, W, 3) uint8.
        caption: the prompt.

    Raises:
        DitAttnError: not a caption of the shapes world: what is an artifact elsewhere is not known.
    """
    if not is_world_caption(caption):
        raise DitAttnError("artifact-rate knows images of the shapes world only; this prompt is none of its captions")
    return artifacts.artifact_rate(frames)
