"""Over-saturation and artifacts of one item: pictures of the shapes world by the world, others beside dense."""

from __future__ import annotations

import numpy as np

from dit_attn.errors import DitAttnError
from dit_attn.eval import world

PALETTE, AGAINST = "palette of the shapes world", "against dense"


def of_world(caption: str | None) -> bool:
    """Whether a text is a caption of the shapes world."""
    try:
        world.parse(caption or "")
    except DitAttnError:
        return False
    return True


def saturation(frames: np.ndarray, dense: np.ndarray | None, caption: str | None) -> float:
    """Share of over-saturated pixels among the coloured ones (``eval.artifacts.oversaturated``).

    Args:
        frames: (F, H, W, 3) uint8.
        dense: the same without a method, which bounds the colours where the caption is not of the world.
        caption: what was asked for.
    """
    from dit_attn.eval.artifacts import oversaturated

    return oversaturated(frames, None if dense is None or of_world(caption) else dense)


def artifact_rate(frames: np.ndarray, caption: str) -> float:
    """Share of frames with an artifact (``eval.artifacts.artifacts``).

    Raises:
        DitAttnError: not a caption of the world: what is an artifact elsewhere is not known.
    """
    from dit_attn.eval.artifacts import artifact_rate as rate

    if not of_world(caption):
        raise DitAttnError("artifact-rate knows pictures of the shapes world only; this prompt is none of its captions")
    return rate(frames)
