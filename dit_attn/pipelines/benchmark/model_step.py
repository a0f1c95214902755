"""Time one denoising step of a transformer, dense and with methods in turns, and one of its attention calls by itself.

The clock stands inside the run, after the dense steps of a method, so that the timed step is a sparse one. Methods with
state from step to step are timed at the step that refreshes it and at the one after.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dit_attn.api import disable, enabled
from dit_attn.errors import DitAttnError
from dit_attn.pipelines.benchmark import peak_memory
from dit_attn.pipelines.benchmark.attention_call import (
    describe_call,
    middle_call,
    prefer_dense_kernels,
    rank_dense_kernels,
    time_attention,
)
from dit_attn.pipelines.benchmark.frozen_step import (
    Competitor,
    FrozenPipeline,
    Progress,
    first_line,
    is_out_of_memory,
    time_call,
)
from dit_attn.pipelines.benchmark.step_table import AttentionTimes, StepTimes, attention_row, dense_row, step_row
from dit_attn.processors.attach.summary import Summary, summarize

NOTE = (
    "weights are random: latency does not depend on them, except for methods that let the data choose how many blocks "
    "to compute (top_p)"
)


def measure_step(
    model: torch.nn.Module,
    inputs: dict[str, Any],
    competitors: Sequence[Competitor],
    repeats: int,
    device: torch.device,
    on_progress: Progress = lambda text: None,
) -> dict[str, Any]:
    """Time a denoising step in turns: every round runs dense and every method once, after one round of warm-up.

    Args:
        model: the transformer, on ``device``.
        inputs: arguments of its forward call.
        competitors: the methods, see :func:`~dit_attn.pipelines.benchmark.frozen_step.make_competitor`.
        repeats: timed rounds.
        device: where the model is.
        on_progress: called with a line of text before every round.

    Returns:
        ``dense``, ``rows`` (one per method and kind of step, and the mean step of methods with two kinds),
        ``attention`` (the call that was timed by itself) and ``memory`` (what the peak memory includes).

    Raises:
        DitAttnError: the family does not support a method, a method computed no attention call, or too little memory.
    """
    pipe = FrozenPipeline(model, inputs, device)
    try:
        with torch.no_grad():
            on_progress("a dense step, to find its attention calls")
            call, count = middle_call(pipe)
            order = rank_dense_kernels(call, device)
            attention = describe_call(call, count) | {"dense_kernels": order or ["torch's only one"]}
            with prefer_dense_kernels(order):
                calls = time_attention(call, competitors, repeats, device, on_progress)
                del call  # its q, k and v are no part of a step's memory
                steps = time_steps(pipe, competitors, repeats, on_progress)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        why = first_line(error)
        raise DitAttnError(f"{device} has too little memory for a step ({why}); use fewer --tokens") from error
    dense = dense_row(steps[None], calls[None], count)
    fraction = dense["attention_share_cpu" if device.type == "cpu" else "attention_share"]
    rows = [row for one in competitors for row in _rows(one, steps, calls, fraction)]
    return {"dense": dense, "rows": rows, "attention": attention, "memory": peak_memory.label(device)}


def _rows(
    one: Competitor, steps: dict[Any, StepTimes], calls: dict[Any, AttentionTimes], attention_share: float
) -> list[dict[str, Any]]:
    """One row per kind of step, and their mean over a period."""
    settings = {"label": one.label, "method": one.method.to_dict(), "depends_on_weights": one.method.executed is None}
    rows = []
    for phase in one.phases:
        key = one.label, phase.name
        attention = attention_row(calls[key], calls[None], sparse=phase.name == "sparse")
        figures = step_row(steps[key], steps[None], attention_share)
        rows.append({**settings, "phase": phase.name, "step": phase.step, **figures, "attention": attention})
    if len(rows) == 2:
        period = sum(phase.count for phase in one.phases)
        first, later = (steps[one.label, phase.name] for phase in one.phases)
        figures = step_row(first.mixed(later, one.phases[1].count / period), steps[None], attention_share)
        rows.append({**settings, "phase": f"mean of {period} steps", "step": None, **figures, "attention": None})
    return rows


def time_steps(
    pipe: FrozenPipeline, competitors: Sequence[Competitor], repeats: int, on_progress: Progress
) -> dict[Any, StepTimes]:
    """Time full steps, dense and by every method, in turns.

    Args:
        pipe: the frozen pipeline.
        competitors: the methods.
        repeats: timed rounds, after one that warms up.
        on_progress: called with a line of text before every step.

    Returns:
        Times by (label, phase); those of dense steps under ``None``.

    Raises:
        DitAttnError: a method computed no attention call.
    """
    found: dict[Any, StepTimes] = {None: StepTimes()}
    for turn in range(repeats + 1):
        on_progress(f"steps, round {turn} of {repeats}: dense")
        disable(pipe.target)
        _time_step(pipe, found[None], turn)
        for one in competitors:
            on_progress(f"steps, round {turn} of {repeats}: {one.label}")
            with enabled(pipe.target, one.method) as session:
                for phase in one.phases:
                    pipe.set_step(phase.step)
                    times = found.setdefault((one.label, phase.name), StepTimes())
                    before = summarize({"transformer": session})
                    _time_step(pipe, times, turn)
                    _count_calls(times, before, summarize({"transformer": session}))
                    if not times.sparse_calls:
                        why = next(iter(times.fallbacks), "nothing requested")
                        raise DitAttnError(f"--method {one.label} took no attention call of the step: {why}")
    return found


def _time_step(pipe: FrozenPipeline, into: StepTimes, turn: int) -> None:
    """Time one step; the first turn warms up."""
    peak_memory.reset(pipe.device)
    seconds = time_call(pipe.run_step, pipe.device)
    highest = peak_memory.read(pipe.device)
    if turn:
        into.times.add(seconds)
        into.peak = highest if into.peak is None or highest is None else max(into.peak, highest)


def _count_calls(into: StepTimes, before: Summary, after: Summary) -> None:
    """Record what the method computed in one step, from the summaries before and after it."""
    into.calls, into.sparse_calls = after.calls - before.calls, after.sparse_calls - before.sparse_calls
    into.computed = after.sparse_calls * (after.density or 0.0) - before.sparse_calls * (before.density or 0.0)
    counts = {reason: count - before.fallbacks.get(reason, 0) for reason, count in after.fallbacks.items()}
    into.fallbacks = {reason: count for reason, count in counts.items() if count}
