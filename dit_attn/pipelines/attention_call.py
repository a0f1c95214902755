"""One attention call of a model by itself: dense and by methods in turns, choosing and running apart."""

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
from dit_attn.kernels import BlockLayout, bench
from dit_attn.kernels.ops import choose_backend
from dit_attn.pipelines.held import STEPS, Competitor, HeldPipeline, Progress, first_line, out_of_memory, watched
from dit_attn.pipelines.step_rows import Part
from dit_attn.processors import engage, executor
from dit_attn.processors.clock import Clock
from dit_attn.processors.executor import AttentionCall, Request
from dit_attn.processors.reader import Reader

_KERNELS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def seen_calls(held: HeldPipeline) -> tuple[AttentionCall, int]:
    """The attention call of the middle layer of a dense step, and how many calls of its shape the step has.

    Raises:
        DitAttnError: no call that a method could take.
    """
    shapes: list[torch.Size] = []
    reasons: list[str] = []
    chosen: list[AttentionCall] = []

    def observe(call: AttentionCall, request: Request, out: torch.Tensor) -> None:
        reason = executor.unfit(call)
        if reason is not None:
            reasons.append(reason)
            return
        shapes.append(call.q.shape)
        if call.site.index == call.site.session.layer_count // 2:
            chosen[:] = [call]

    disable(held)
    with observing(held, observe):
        held.step()
    if not chosen:
        why = f": {reasons[0]}" if reasons else ""
        raise DitAttnError(f"{type(held.transformer).__name__} made no attention call that a method can take{why}")
    return chosen[0], shapes.count(chosen[0].q.shape)


def described(call: AttentionCall, count: int) -> dict[str, Any]:
    """What is timed: the call's shape (B, S, H, D), whether it has a mask, and the kernel of sparse calls."""
    seq_len = call.q.shape[1]
    whole = BlockLayout.dense(seq_len, seq_len, 128, 128, call.q.device)  # the choice does not look at the blocks
    return {
        "shape": list(call.q.shape),
        "masked": call.mask is not None,
        "calls_of_a_step": count,
        "layer": call.site.name,
        "sparse_kernel": choose_backend(call.q, whole).backend,
    }


def attention_parts(
    call: AttentionCall, competitors: Sequence[Competitor], repeats: int, device: torch.device, progress: Progress
) -> dict[Any, Part]:
    """One attention call, dense (key ``None``) and by every method and kind of step (label, phase), in turns."""
    found: dict[Any, Part] = {None: Part()}
    dense = executor.dense_rows(call)
    for turn in range(repeats + 1):
        progress(f"attention, round {turn} of {repeats}")
        taken = watched(lambda: dense(call.q, call.k, call.v, call.mask), device)
        if turn:
            found[None].run.add(taken)
        for one in competitors:
            memory: dict[Any, Any] = {}
            for phase in one.phases:
                part = found.setdefault((one.label, phase.name), Part())
                plan, run, part.share = _attend(_call_at(call, one.method, phase.step, memory), one, device)
                if turn:
                    part.plan.add(plan)
                    part.run.add(run)
    return found


def _attend(
    call: AttentionCall, one: Competitor, device: torch.device
) -> tuple[tuple[float, float], tuple[float, float], float]:
    """Times of planning and of running, and the executed share of the map."""
    asked = Request()
    reason = executor.read_mask(call, asked, call.site.session.family.mask_rule)
    plan = watched(lambda: None if reason else one.method.request(call, asked), device)
    if asked.empty:
        why = reason or next(iter(asked.declined), "nothing asked")
        raise DitAttnError(f"--method {one.label} leaves the attention of this model dense: {why}")
    try:
        run = watched(lambda: executor.run(call, asked, executor.dense_rows(call)), device)
    except (RuntimeError, NotImplementedError) as error:
        if out_of_memory(error):
            raise
        raise DitAttnError(f"--method {one.label} cannot run here: kernel failed: {first_line(error)}") from error
    return plan, run, float(engage.executed_share(call, asked))


def _call_at(call: AttentionCall, method: Reader, step: int, memory: dict[Any, Any]) -> AttentionCall:
    """The same call at another step, in a layer that the method does not keep dense."""
    real = call.site
    count = real.session.layer_count
    kept = {index % count for index in method.dense_layers}
    index = next((i for i in range(count) if i not in kept), real.index)
    site = SimpleNamespace(name=real.name, index=index, session=real.session, rows=(0, call.q.shape[0]), memory=memory)
    return dataclasses.replace(call, site=cast(Any, site), clock=Clock(run=1, step=step, total=STEPS))


def dense_order(call: AttentionCall, device: torch.device) -> list[str]:
    """Torch's dense kernels of an accelerator, the fastest on this call first; empty on a CPU, which has one."""
    if device.type != "cuda":
        return []
    calls = bench.dense_calls(call.q, call.k, call.v)
    names = [name for name in _KERNELS if name in calls]
    times = dict(zip(names, bench.interleaved([calls[name] for name in names], 3, device)))
    return sorted(names, key=lambda name: min(times[name]))


@contextmanager
def fastest_dense(order: Sequence[str]) -> Iterator[None]:
    """Let torch try its dense kernels in this order, so that the baseline is the best there is."""
    kernels = [*(_KERNELS[name] for name in order), SDPBackend.MATH]
    with sdpa_kernel(kernels, set_priority=True) if order else nullcontext():
        yield
