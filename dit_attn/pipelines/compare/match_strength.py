"""Find the guidance scale that is as strong as a guidance method, so that the two can be compared fairly.

Scores rise with the strength of guidance, whatever its source (2602.22570). The guidance update of a method is split
into a component parallel to ``c - u``, the direction of classifier-free guidance, and the orthogonal rest; the parallel
component is what a larger guidance scale would add.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dit_attn.api import enabled, summary
from dit_attn.errors import DitAttnError
from dit_attn.pipelines.transformers import transformers_of
from dit_attn.processors.attach import attach
from dit_attn.processors.attach.components import unwrap
from dit_attn.processors.core.cfg import CFGRule
from dit_attn.processors.methods.base import Method

_ARGUMENTS = ("true_cfg_scale", "guidance_scale")


@dataclass(frozen=True)
class MatchedScale:
    """The guidance scale that matches a guidance method.

    Attributes:
        argument: name of the argument of the pipeline's call.
        scale: its value whose update along ``c - u`` equals that of the method and the run's own scale together, or
            the nearest one that the pipeline supports.
        parallel: what the method adds to the guidance scale, mean over all steps of the run and over items.
        orthogonal: norm of the orthogonal component of its update, in units of ``|c - u|``, the same mean.
    """

    argument: str
    scale: float
    parallel: float
    orthogonal: float


def guidance_argument(pipe: Any) -> str:
    """Return the argument of the pipeline's call that scales classifier-free guidance.

    Raises:
        DitAttnError: it has none.
    """
    parameters = inspect.signature(type(pipe).__call__).parameters
    name = next((name for name in _ARGUMENTS if name in parameters), None)
    if name is None:
        raise DitAttnError(f"{type(pipe).__name__} takes no guidance scale; strengths cannot be matched on it")
    return name


def guidance_rule(pipe: Any) -> CFGRule:
    """Return how the pipeline runs classifier-free guidance.

    Raises:
        DitAttnError: unsupported family.
    """
    return attach.family_of(unwrap(next(iter(transformers_of(pipe).values()), None))).cfg


def match_guidance_scale(
    pipe: Any,
    methods: Sequence[Method],
    run: Callable[[dict[str, Any], int], None],
    scales: Sequence[float | None],
) -> MatchedScale:
    """Measure the strength of a guidance method and return the guidance scale that matches it.

    Args:
        pipe: the pipeline.
        methods: enabled for the measurement; one of them is a guidance method.
        run: calls the pipeline for an item with some arguments changed, ``run({"guidance_scale": 2.0}, 0)``.
        scales: the guidance scale of every item; ``None`` for the pipeline's default.

    Raises:
        DitAttnError: no unconditional branch was run, so that there is nothing to measure against.
    """
    name, rule = guidance_argument(pipe), guidance_rule(pipe)
    default = inspect.signature(type(pipe).__call__).parameters[name].default
    parallel, orthogonal, own = [], [], []
    for index, scale in enumerate(scales):
        scale = float(default if scale is None else scale)
        with enabled(pipe, *methods):
            run({name: max(scale, rule.barely)}, index)  # without c - u there is nothing to measure against
            report = summary(pipe)
            guidance = report.guidance
        own.append(rule.scale_of(scale))
        if guidance is not None and not guidance.steps:
            continue  # no update: scale 0, or no step of this run
        if guidance is None or guidance.parallel is None or guidance.orthogonal is None:
            raise DitAttnError(
                f"{type(pipe).__name__} ran no unconditional branch at {name}={scale:g}, so that strengths cannot be "
                "matched; give a negative prompt"
            )
        guided = guidance.steps / max(report.steps, 1)
        parallel.append(guided * guidance.parallel)
        orthogonal.append(guided * guidance.orthogonal)
    along = sum(parallel) / len(own)
    scale = rule.argument_for(sum(own) / len(own) + along)
    return MatchedScale(name, round(scale, 3), along, sum(orthogonal) / len(own))
