"""The block of a modular pipeline that encodes prompts, in the place of the ``encode_prompt`` of other pipelines."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

_BLOCK = "text_encoder"
_NEGATIVE = "negative_"


def text_block(pipe: Any) -> Any:
    """Return the block that encodes the prompts of a modular pipeline; ``None`` for other pipelines, or without one."""
    return getattr(getattr(pipe, "_blocks", None), "sub_blocks", {}).get(_BLOCK)


def encode_by_block(twin: Any, arguments: Mapping[str, Any], negative: bool) -> list[Any]:
    """Run the block, and return what it makes of the prompts.

    Args:
        twin: a copy of the pipeline.
        arguments: of the pipeline's call.
        negative: encode the negative prompts, in the place of the prompts.
    """
    from diffusers.modular_pipelines import PipelineState

    given = {name: value for name, value in arguments.items() if not name.startswith(_NEGATIVE)}
    if negative:
        given |= {name.removeprefix(_NEGATIVE): x for name, x in arguments.items() if name.startswith(_NEGATIVE)}
    if getattr(twin, "guider", None) is not None:  # it asks for the unconditional branch too
        twin.__dict__["guider"] = copy.copy(twin.guider)
        twin.guider.disable()
    block, state = text_block(twin), PipelineState()
    for spec in block.inputs:
        state.set(spec.name, given.get(spec.name, spec.default), spec.kwargs_type)
    before = set(state.values)
    block(twin, state)
    return [value for name, value in state.values.items() if name not in before and not name.startswith(_NEGATIVE)]
