"""What the guider of a modular pipeline says of a transformer call: its branch, its step and its scale.

Blocks call the transformer once a branch, and the guider counts the branches that it prepares.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any


def guider_context(pipe: Any) -> SimpleNamespace | None:
    """Return what the guider of the pipeline that is running says, in the form of a ``cache_context``.

    Args:
        pipe: the pipeline, or ``None``.

    Returns:
        ``name``, ``step_index`` and ``num_inference_steps``; ``None`` without a guider, or where it prepared no call.
    """
    guider = getattr(pipe, "guider", None)
    names, number = getattr(guider, "_input_predictions", None), getattr(guider, "_count_prepared", 0)
    if guider is None or not names or not number:
        return None
    count = guider.num_conditions
    if count < len(names):  # the unconditional branch comes second where it runs, perturbed ones after it
        names = [names[0], *names[1 if _is_guided(guider) else 2 :]][:count]
    name = names[number - 1] if number <= len(names) else None
    return SimpleNamespace(name=name, step_index=guider._step, num_inference_steps=guider._num_inference_steps)


def guider_scale(pipe: Any) -> float | None:
    """Return the scale s of ``u + s (c - u)`` at this step, 1 for none, ``None`` without a guider that has one."""
    guider = getattr(pipe, "guider", None)
    scale = getattr(guider, "guidance_scale", None)
    if guider is None or scale is None or not hasattr(guider, "_input_predictions"):
        return None
    if not _is_guided(guider):
        return 1.0
    return float(scale) + bool(getattr(guider, "use_original_formulation", False))


def _is_guided(guider: Any) -> bool:
    """Whether the unconditional branch runs at this step."""
    told = getattr(guider, "_is_cfg_enabled", None)
    return bool(told()) if told is not None else guider.num_conditions > 1
