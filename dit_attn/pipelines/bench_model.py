"""One denoising step of a transformer, dense and with methods, in turns; and one of its attention calls by itself.

The clock is held inside the run, after the dense steps of a method, so that what is timed is a sparse step. Methods
that remember from step to step are timed at the step that fills their memory and at the one that reads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch

from dit_attn.api import disable, enabled
from dit_attn.errors import DitAttnError
from dit_attn.pipelines import peak
from dit_attn.pipelines.attention_call import attention_parts, dense_order, described, fastest_dense, seen_calls
from dit_attn.pipelines.held import Competitor, HeldPipeline, Progress, competitor, first_line, out_of_memory, watched
from dit_attn.pipelines.step_rows import Part, Step, attention_row, dense_row, step_row
from dit_attn.processors.re_ttention import ReTtention
from dit_attn.processors.summary import Summary, summarize

__all__ = ["NOTE", "Competitor", "competitor", "measure"]

NOTE = (
    "weights are random: latency does not depend on them, except for methods that choose how much to read by the data "
    "(top_p)"
)


def measure(
    model: torch.nn.Module,
    inputs: dict[str, Any],
    competitors: Sequence[Competitor],
    repeats: int,
    device: torch.device,
    progress: Progress = lambda text: None,
) -> dict[str, Any]:
    """Time everything in turns: every round runs dense and every method once, after one round that is thrown away.

    Args:
        model: the transformer, on ``device``.
        inputs: arguments of its forward call.
        competitors: the methods.
        repeats: rounds.
        device: where it is.
        progress: told what is about to be done.

    Returns:
        ``dense``, ``rows`` (one a method and kind of step, and the mean step of methods with two kinds), ``attention``
        (the call that was timed by itself) and ``memory`` (what the peaks are).

    Raises:
        DitAttnError: a method that the family cannot take or that took no attention call, or too little memory.
    """
    held = HeldPipeline(model, inputs, device)
    try:
        with torch.no_grad():
            progress("a dense step, to see its attention calls")
            call, count = seen_calls(held)
            order = dense_order(call, device)
            about = described(call, count) | {"dense_kernels": order or ["torch's only one"]}
            with fastest_dense(order):
                parts = attention_parts(call, competitors, repeats, device, progress)
                del call  # its q, k and v are no part of a step's memory
                steps = step_times(held, competitors, repeats, progress)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        why = first_line(error)
        raise DitAttnError(f"{device} has too little memory for a step ({why}); take fewer --tokens") from error
    dense = dense_row(steps[None], parts[None], count)
    part = dense["attention_share_cpu" if device.type == "cpu" else "attention_share"]
    rows = [row for one in competitors for row in _rows(one, steps, parts, part)]
    return {"dense": dense, "rows": rows, "attention": about, "memory": peak.label(device)}


def _rows(one: Competitor, steps: dict[Any, Step], parts: dict[Any, Part], attention_share: float) -> list[Any]:
    """One row a kind of step, and their mean over a period."""
    about = {"label": one.label, "method": one.method.to_dict(), "depends_on_weights": one.method.executed is None}
    rows = []
    for phase in one.phases:
        key = one.label, phase.name
        attention = attention_row(parts[key], parts[None], sparse=phase.name == "sparse")
        figures = step_row(steps[key], steps[None], attention_share)
        rows.append({**about, "phase": phase.name, "step": phase.step, **figures, "attention": attention})
    if len(rows) == 2:
        period = cast(ReTtention, one.method).period
        first, later = (steps[one.label, phase.name] for phase in one.phases)
        figures = step_row(first.mixed(later, 1.0 - 1.0 / period), steps[None], attention_share)
        rows.append({**about, "phase": f"mean of {period} steps", "step": None, **figures, "attention": None})
    return rows


def step_times(
    held: HeldPipeline, competitors: Sequence[Competitor], repeats: int, progress: Progress
) -> dict[Any, Step]:
    """Whole steps, dense (key ``None``) and by every method and kind of step (label, phase), in turns."""
    found: dict[Any, Step] = {None: Step()}
    for turn in range(repeats + 1):
        progress(f"steps, round {turn} of {repeats}: dense")
        disable(held)
        _take(held, found[None], turn)
        for one in competitors:
            progress(f"steps, round {turn} of {repeats}: {one.label}")
            with enabled(held, one.method) as session:
                for phase in one.phases:
                    held.hold(phase.step)
                    step = found.setdefault((one.label, phase.name), Step())
                    before = summarize({"transformer": session})
                    _take(held, step, turn)
                    _count(step, before, summarize({"transformer": session}))
                    if not step.engaged:
                        why = next(iter(step.declined), "nothing asked")
                        raise DitAttnError(f"--method {one.label} took no attention call of the step: {why}")
    return found


def _take(held: HeldPipeline, into: Step, turn: int) -> None:
    """Time one step; the first turn warms up."""
    peak.reset(held.device)
    taken = watched(held.step, held.device)
    highest = peak.read(held.device)
    if turn:
        into.times.add(taken)
        into.peak = highest if into.peak is None or highest is None else max(into.peak, highest)


def _count(into: Step, before: Summary, after: Summary) -> None:
    """What the method did in one step, from the statistics of the run before and after it."""
    into.calls, into.engaged = after.calls - before.calls, after.engaged - before.engaged
    into.kept = after.engaged * (after.density or 0.0) - before.engaged * (before.density or 0.0)
    counts = {reason: count - before.declined.get(reason, 0) for reason, count in after.declined.items()}
    into.declined = {reason: count for reason, count in counts.items() if count}
