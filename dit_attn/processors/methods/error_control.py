"""Choose the density of every layer and step by its measured error, in the place of a fixed share of dense steps.

A layer starts with the lowest density of a ladder whose error, measured on sampled rows, is allowed. Every few steps,
in turns with the other layers, it measures the densities around its own; the next step moves to the lowest that is
allowed, or to dense attention. What is measured at one step is read at the next, so that no step waits for the numbers
of a GPU; only the first call of a layer in a run does.

Allowed is ``target_error`` times the root of the density. For errors that fall with a power of the density, this is
where all layers and steps gain as much, in squared error, from a little more attention: the least sum of squared errors
for what is computed. Layers that need much attention may have larger errors than those that need little.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

from dit_attn.errors import DitAttnError
from dit_attn.processors.core.call import AttentionCall, Request
from dit_attn.processors.core.later_numbers import LaterNumbers
from dit_attn.processors.core.output_error import sampled_errors, sampled_places
from dit_attn.processors.core.remedies import failure_reason
from dit_attn.processors.methods.error_report import report_of
from dit_attn.processors.methods.refresh import RefreshSchedule
from dit_attn.processors.methods.sparse import SparseMethod

RUNGS = 5
"""Sparse densities of the ladder."""
_DENSEST = 0.8  # above it a sparse call is no gain
_MARGIN = 0.85  # of the bound, within which a layer goes back to a lower density
_SLOPES = 0.25, 3.0  # limits of that of the logarithm of the error over the log-odds of what is skipped
_PERIODS = 2, 6  # least and most steps from one measurement of a layer to the next


def ladder_of(least: float) -> tuple[float, ...]:
    """Return the densities to choose from, from the least one to 1, each the same factor above the last."""
    rungs = [least * least ** (-step / RUNGS) for step in range(RUNGS)]
    return (*(round(rung, 4) if rung > least else rung for rung in rungs if rung <= max(least, _DENSEST)), 1.0)


def pick_rung(ladder: Sequence[float], rung: int, errors: Mapping[int, float], bound: float) -> int:
    """Return the lowest rung whose error is allowed; one below the present only with some margin.

    Of two neighbors that were measured, a line of log error over log-odds says the error of the rungs above them. None
    below the lowest measured rung is taken. The last rung is dense attention.

    Args:
        ladder: densities, ascending, the last one 1.
        rung: the present one.
        errors: measured error of one rung or two neighbors.
        bound: of the error at density 1.
    """
    for place in range(min(errors), len(ladder) - 1):
        limit = bound * math.sqrt(ladder[place]) * (_MARGIN if place < rung else 1.0)
        if (errors[place] if place in errors else _extrapolated(ladder, errors, place)) <= limit:
            return place
    return len(ladder) - 1


def _extrapolated(ladder: Sequence[float], errors: Mapping[int, float], place: int) -> float:
    odds = {rung: math.log(1.0 / ladder[rung] - 1.0) for rung in (place, *errors)}
    low, high = min(errors), max(errors)
    if not errors[high] > 0.0:
        return errors[high]  # exact, or not a number
    slope = _SLOPES[0]
    if low < high:
        slope = (math.log(max(errors[low], 1e-30)) - math.log(errors[high])) / (odds[low] - odds[high])
    slope = min(max(slope, _SLOPES[0]), _SLOPES[1])
    return errors[high] * math.exp(slope * (odds[place] - odds[high]))


@dataclass
class LayerControl:
    """What a layer knows of its errors, for the rows of one call per step.

    Attributes:
        ladder: the densities.
        rung: the present one.
        step: step of the last measurement.
        turns: measurements so far.
        pending: the last measurement: its rungs and their errors, until it is read.
        failed: why the last measurement could not be made, else "".
    """

    ladder: tuple[float, ...]
    rung: int = 0
    step: int = 0
    turns: int = 0
    pending: tuple[tuple[int, ...], LaterNumbers] | None = None
    failed: str = ""

    @property
    def watched(self) -> tuple[int, ...]:
        """The rungs to measure: the present one and the one below it; of those below dense attention, the top two."""
        top = min(self.rung, len(self.ladder) - 2)
        return tuple(range(max(0, top - 1), top + 1))

    def settle(self, bound: float) -> dict[int, float]:
        """Move to the rung that the last measurement asks for, and return its errors by rung; empty without one."""
        if self.pending is None:
            return {}
        rungs, numbers = self.pending
        errors = dict(zip(rungs, numbers.read()))
        self.rung, self.pending = pick_rung(self.ladder, self.rung, errors, bound), None
        return errors


def plan_controlled(method: SparseMethod, bound: float, least: float, call: AttentionCall, request: Request) -> None:
    """Plan a call at the density that its layer's errors ask for, or decline it, and measure where it is due.

    Args:
        method: whose density is controlled.
        bound: of the error.
        least: the lowest density.
        call: the attention call.
        request: to be filled.

    Raises:
        DitAttnError: the call is differentiated.
    """
    if torch.is_grad_enabled() and call.q.requires_grad:
        raise DitAttnError(
            f"{method.slug} with target_error cannot be trained: its densities follow the errors of earlier steps of "
            "one run; train with fixed densities, or sample under torch.no_grad()"
        )
    states, key = call.layer.state, (LayerControl, call.branches, call.layer.rows, call.q.shape)
    control: LayerControl | None = states.get(key)
    if control is not None:
        used = control.rung
        _note_error(call, control.settle(bound).get(used))
    reason = _unsupported_reason(call) or call.layer.stateless or method.exception(call)
    if reason is not None:
        request.decline(reason)
        return
    if control is None:
        control = states[key] = LayerControl(ladder_of(least))
        if bound > 0.0:
            _measure(method, control, range(len(control.ladder) - 1), call, request)
            _note_error(call, control.settle(bound).get(control.rung))
        else:
            control.rung = len(control.ladder) - 1
    density = control.ladder[control.rung]
    report_of(call, method.slug, bound).add(call.layer.name, call.clock.step, density)
    if density < 1.0:
        request.max_error, request.density = method.max_error, density
        _fixed(method, density).plan(call, request)
    else:
        request.decline(control.failed or "target_error needs density 1")
    if bound > 0.0 and _is_due(method, control, call):
        _measure(method, control, control.watched, call, request)


def _unsupported_reason(call: AttentionCall) -> str | None:
    split = call.shard[1] > 1  # one device alone must not go dense: the others would wait for it
    return "error control of a sequence that is split over devices" if split else None


def _is_due(method: SparseMethod, control: LayerControl, call: AttentionCall) -> bool:
    """Whether the layer measures at this step: in turns, and not at the last step, which nobody would read."""
    least, most = _PERIODS
    period = min(most, max(least, (call.clock.total or 8 * least) // 8))
    schedule = RefreshSchedule(period, True, method.dense_steps, method.dense_last_steps)
    return schedule.due(call, control.step) and not schedule.ends(call)


def _measure(
    method: SparseMethod, control: LayerControl, rungs: Iterable[int], call: AttentionCall, request: Request
) -> None:
    """Measure the errors of some rungs, to be read later; nothing where the method declines such a call."""
    planned: list[Request] = []
    share, chosen = 1.0, 0.0
    for rung in rungs:
        fixed, own = _fixed(method, control.ladder[rung]), request
        if not request.sparse or rung != control.rung:
            own = replace(request, declined=[])
            own.go_dense()
            fixed.plan(call, own)
            chosen += own.selection_cost
        if not own.sparse:
            return
        planned.append(own)
        share += fixed.executed or control.ladder[rung]
    places, tile = sampled_places(call, method.q_block, control.turns)
    control.turns, control.step = control.turns + 1, call.clock.step
    try:
        errors = sampled_errors(call, planned, places, tile)
    except (RuntimeError, NotImplementedError) as error:  # of a kernel: dense until a later measurement
        control.failed, control.rung = failure_reason(error), len(control.ladder) - 1
        return
    control.failed, control.pending = "", (tuple(rungs), LaterNumbers(errors))
    visual = call.visual.stop - call.visual.start
    call.layer.stats.measurements += 1
    call.layer.stats.measuring += (share * len(places) + chosen * visual) / call.q.shape[1]


def _note_error(call: AttentionCall, error: float | None) -> None:
    if error is not None:
        call.layer.stats.note_error(error)


@lru_cache(maxsize=1024)
def _fixed(method: SparseMethod, density: float) -> SparseMethod:
    changes: dict[str, Any] = {"density": density, "target_error": None}
    return replace(method, **changes)
