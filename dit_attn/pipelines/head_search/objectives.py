"""The built-in objectives of a head search, by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from dit_attn.errors import unknown
from dit_attn.pipelines.head_search import clip_objectives, world_objectives
from dit_attn.pipelines.head_search.objective import Objective, ScorerOptions

OBJECTIVES: dict[str, Callable[[ScorerOptions], Objective]] = {
    "clip-world": world_objectives.clip_world,
    "verifier": partial(world_objectives.verifier, by_attribute=True),
    "verifier-whole": partial(world_objectives.verifier, by_attribute=False),
    "fid-world": world_objectives.fid_world,
    "drawn-world": world_objectives.drawn_world,
    "clip": clip_objectives.clip,
    "style": clip_objectives.style,
    "pickscore": partial(clip_objectives.preference, name="pickscore", what="the model PickScore_v1"),
    "hpsv2": partial(clip_objectives.preference, name="hpsv2", what="the model HPSv2 (ViT-H/14)"),
    "aesthetic": clip_objectives.aesthetic,
}


def make_objective(wanted: Any, options: ScorerOptions | None = None) -> Objective:
    """Return the objective of a name, or make one of a callable.

    Args:
        wanted: a key of :data:`OBJECTIVES`, an :class:`Objective`, or a callable ``(images, prompts) -> scores``; its
            attribute ``pixels``, if any, is the differentiable function.
        options: networks and files that the objective needs.

    Raises:
        DitAttnError: unknown name, or something the objective needs is missing; the message says what.
    """
    if isinstance(wanted, Objective):
        return wanted
    if callable(wanted):
        name = getattr(wanted, "__name__", type(wanted).__name__)
        return Objective(name, wanted, pixels=getattr(wanted, "pixels", None))
    if wanted not in OBJECTIVES:
        raise unknown("objective", wanted, OBJECTIVES)
    return OBJECTIVES[wanted](options or ScorerOptions())
