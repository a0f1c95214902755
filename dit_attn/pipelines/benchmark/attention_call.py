"""Time one attention call of a model by itself: dense and by methods in turns, selection and execution apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from dit_attn.api import disable, observing
from dit_attn.errors import DitAttnError
from dit_attn.kernels import BlockLayout
from dit_attn.kernels.benchmark import measure, timing
from dit_attn.kernels.functional import choose_backend
from dit_attn.pipelines.benchmark.frozen_step import (
    STEPS,
    Competitor,
    FrozenPipeline,
    Progress,
    first_line,
    is_out_of_memory,
    time_call,
)
from dit_attn.pipelines.benchmark.step_table import AttentionTimes
from dit_attn.processors.core import dispatch, executor
from dit_attn.processors.core.call import AttentionCall, Request
from dit_attn.processors.core.clock import Clock
from dit_attn.processors.core.parameters import untrained_modules
from dit_attn.processors.methods.sparse import SparseMethod

_DENSE_KERNELS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def middle_call(pipe: FrozenPipeline) -> tuple[AttentionCall, int]:
    """Return the attention call of the middle layer of a dense step, and how many calls of its shape the step has.

    Raises:
        DitAttnError: no call that a method could compute.
    """
    shapes: list[torch.Size] = []
    reasons: list[str] = []
    chosen: list[AttentionCall] = []

    def observe(call: AttentionCall, request: Request, out: torch.Tensor) -> None:
        reason = executor.unsupported_reason(call)
        if reason is not None:
            reasons.append(reason)
            return
        shapes.append(call.q.shape)
        if call.layer.index == call.layer_count // 2:
            chosen[:] = [call]

    disable(pipe.target)
    with observing(pipe.target, observe):
        pipe.run_step()
    if not chosen:
        why = f": {reasons[0]}" if reasons else ""
        raise DitAttnError(f"{type(pipe.transformer).__name__} made no attention call that a method can take{why}")
    return chosen[0], shapes.count(chosen[0].q.shape)


def describe_call(call: AttentionCall, count: int) -> dict[str, Any]:
    """Describe the timed call: shape (B, S, H, D), whether it has a mask, and the backend of sparse calls.

    Args:
        call: the attention call.
        count: number of such calls in a step.
    """
    seq_len = call.q.shape[1]
    blocks = -(-seq_len // 128)
    some = torch.arange(blocks, device=call.q.device).expand(1, 1, blocks, -1) % 2 == 0  # sdpa runs dense ones
    sparse = BlockLayout.from_mask(some, seq_len, seq_len, 128, 128)
    return {
        "shape": list(call.q.shape),
        "masked": call.mask is not None,
        "calls_of_a_step": count,
        "layer": call.layer.name,
        "sparse_kernel": choose_backend(call.q, sparse).backend,
    }


def time_attention(
    call: AttentionCall, competitors: Sequence[Competitor], repeats: int, device: torch.device, on_progress: Progress
) -> dict[Any, AttentionTimes]:
    """Time one attention call, dense and by every method, in turns.

    Args:
        call: the attention call.
        competitors: the methods.
        repeats: timed rounds, after one that warms up.
        device: of the tensors.
        on_progress: called with a line of text before every round.

    Returns:
        Times by (label, phase); those of dense attention under ``None``.
    """
    found: dict[Any, AttentionTimes] = {None: AttentionTimes()}
    dense = executor.dense_rows(call)
    for turn in range(repeats + 1):
        on_progress(f"attention, round {turn} of {repeats}")
        seconds = time_call(lambda: dense(call.q, call.k, call.v, call.mask), device)
        if turn:
            found[None].run.add(seconds)
        for one in competitors:
            state: dict[Any, Any] = {}
            for phase in one.phases:
                times = found.setdefault((one.label, phase.name), AttentionTimes())
                plan, run, times.density = _time_method(_call_at(call, one.method, phase.step, state), one, device)
                if turn:
                    times.plan.add(plan)
                    times.run.add(run)
    return found


def _time_method(
    call: AttentionCall, one: Competitor, device: torch.device
) -> tuple[tuple[float, float], tuple[float, float], float]:
    """Times of selection and of execution, and the attention computed as a fraction of dense."""
    request = Request()
    reason = executor.read_mask(call, request)
    plan = time_call(lambda: None if reason else one.method.request(call, request), device)
    if request.empty:
        why = reason or next(iter(request.declined), "nothing requested")
        raise DitAttnError(f"--method {one.label} leaves the attention of this model dense: {why}")
    try:
        run = time_call(lambda: executor.run(call, request, executor.dense_rows(call)), device)
    except (RuntimeError, NotImplementedError) as error:
        if is_out_of_memory(error):
            raise
        raise DitAttnError(f"--method {one.label} cannot run here: kernel failed: {first_line(error)}") from error
    return plan, run, float(dispatch.computed_fraction(call, request))


def _call_at(call: AttentionCall, method: SparseMethod, step: int, state: dict[Any, Any]) -> AttentionCall:
    """The same call at another step, in a layer that the method does not leave dense."""
    count = call.layer_count
    dense = {index % count for index in method.dense_layers}
    index = next((i for i in range(count) if i not in dense), call.layer.index)
    rows = (0, call.q.shape[0])
    learned = untrained_modules(method, call)
    layer = SimpleNamespace(
        name=call.layer.name, index=index, rows=rows, state=state, stateless=None, learned=learned
    )  # fmt: skip
    return dataclasses.replace(call, layer=cast(Any, layer), clock=Clock(run=1, step=step, total=STEPS))


def rank_dense_kernels(call: AttentionCall, device: torch.device) -> list[str]:
    """Return torch's dense kernels on an accelerator, the fastest on this call first; empty on a CPU, which has one."""
    if device.type != "cuda":
        return []
    calls = measure.dense_calls(call.q, call.k, call.v)
    names = [name for name in _DENSE_KERNELS if name in calls]
    times = dict(zip(names, timing.interleaved([calls[name] for name in names], 3, device)))
    return sorted(names, key=lambda name: min(times[name]))


@contextmanager
def prefer_dense_kernels(order: Sequence[str]) -> Iterator[None]:
    """Let torch try its dense kernels in this order, so that the baseline is the fastest one."""
    kernels = [*(_DENSE_KERNELS[name] for name in order), SDPBackend.MATH]
    with sdpa_kernel(kernels, set_priority=True) if order else nullcontext():
        yield
