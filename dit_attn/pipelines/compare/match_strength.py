"""The guidance scale that pushes as far as a guidance method does, so that the two can be compared fairly.

Scores rise with the strength of guidance, whatever makes it (arXiv 2602.22570). The push of a method is split along
and across ``c - u``, the direction of classifier-free guidance; the part along it is what a larger scale would do.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dit_attn.api import enabled, summary
from dit_attn.errors import DitAttnError
from dit_attn.pipelines.head_search.evaluation import models_of
from dit_attn.processors.attach import attach
from dit_attn.processors.core.cfg import CFGRule
from dit_attn.processors.methods.base import Method

_ARGUMENTS = ("true_cfg_scale", "guidance_scale")


@dataclass(frozen=True)
class Matched:
    """What was measured.

    Attributes:
        argument: of the pipeline's call.
        scale: its value that pushes as far along ``c - u`` as the method and the run's own scale together, or the
            nearest that the pipeline can guide with.
        parallel: what the method adds, mean over all steps of the run, pushed or not, and over items.
        sideways: the rest of its push, in units of ``|c - u|``, the same mean.
    """

    argument: str
    scale: float
    parallel: float
    sideways: float


def guidance_argument(pipe: Any) -> str:
    """The argument of the pipeline's call that scales classifier-free guidance.

    Raises:
        DitAttnError: it has none.
    """
    taken = inspect.signature(type(pipe).__call__).parameters
    name = next((name for name in _ARGUMENTS if name in taken), None)
    if name is None:
        raise DitAttnError(f"{type(pipe).__name__} takes no guidance scale; strengths cannot be matched on it")
    return name


def guidance_rule(pipe: Any) -> CFGRule:
    """How the pipeline runs classifier-free guidance.

    Raises:
        DitAttnError: unsupported family.
    """
    return attach.family_of(attach.unwrap(next(iter(models_of(pipe)), None))).guidance


def matched(
    pipe: Any,
    methods: Sequence[Method],
    run: Callable[[dict[str, Any], int], None],
    scales: Sequence[float | None],
) -> Matched:
    """Measure the strength of guidance methods.

    Args:
        pipe: the pipeline.
        methods: what is enabled for it; one of them guides.
        run: calls the pipeline for an item with some arguments changed, ``run({"guidance_scale": 2.0}, 0)``.
        scales: the guidance scale of every item; ``None`` for the pipeline's default.

    Raises:
        DitAttnError: no unconditional branch was run, so that there is nothing to measure against.
    """
    name, rule = guidance_argument(pipe), guidance_rule(pipe)
    default = inspect.signature(type(pipe).__call__).parameters[name].default
    parallel, sideways, own = [], [], []
    for index, scale in enumerate(scales):
        scale = float(default if scale is None else scale)
        with enabled(pipe, *methods):
            run({name: max(scale, rule.barely)}, index)  # c - u must be there to measure against
            told = summary(pipe)
            found = told.guidance
        own.append(rule.scale_of(scale))
        if found is not None and not found.steps:
            continue  # nothing was pushed: scale 0, or no step of this run
        if found is None or found.parallel is None or found.sideways is None:
            raise DitAttnError(
                f"{type(pipe).__name__} ran no unconditional branch at {name}={scale:g}, so that strengths cannot be "
                "matched; give a negative prompt"
            )
        pushed = found.steps / max(told.steps, 1)
        parallel.append(pushed * found.parallel)
        sideways.append(pushed * found.sideways)
    along = sum(parallel) / len(own)
    scale = rule.told_for(sum(own) / len(own) + along)
    return Matched(name, round(scale, 3), along, sum(sideways) / len(own))
