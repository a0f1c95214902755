"""One denoising step of a transformer, dense and with methods, in turns; and one of its attention calls by itself.

The clock is held inside the run, after the dense steps of a method, so that what is timed is a sparse step. Methods
that remember from step to step are timed at the step that fills their memory and at the one that reads it.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from dit_attn.api import disable, enabled, observing
from dit_attn.errors import DitAttnError
from dit_attn.kernels import BlockLayout, bench
from dit_attn.kernels.ops import choose_backend
from dit_attn.pipelines import peak
from dit_attn.pipelines.step_rows import Part, Step, attention_row, dense_row, step_row
from dit_attn.processors import engage, executor
from dit_attn.processors.clock import Clock
from dit_attn.processors.executor import AttentionCall, Request
from dit_attn.processors.method import Method, share
from dit_attn.processors.re_ttention import ReTtention
from dit_attn.processors.reader import Reader
from dit_attn.processors.summary import Summary, summarize

STEPS = 50  # steps of the run that the timed step is taken from
NOTE = (
    "weights are random: latency does not depend on them, except for methods that choose how much to read by the data "
    "(top_p)"
)
_KERNELS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Phase:
    """A kind of step of a method: its name, and a step of the run that shows it."""

    name: str
    step: int


@dataclass(frozen=True)
class Competitor:
    """A method to measure.

    Attributes:
        label: its name in tables.
        method: its settings.
        phases: the steps to time, in order; later ones use what earlier ones left.
    """

    label: str
    method: Reader
    phases: tuple[Phase, ...]


class HeldPipeline:
    """Stands for a pipeline around a transformer, at a step of its run that does not move by itself.

    Args:
        transformer: on ``device``.
        inputs: arguments of its forward call.
        device: where it is.
    """

    do_classifier_free_guidance = False

    def __init__(self, transformer: torch.nn.Module, inputs: dict[str, Any], device: torch.device) -> None:
        self.transformer, self.inputs, self.device = transformer, inputs, device
        self.scheduler = SimpleNamespace(timesteps=torch.linspace(999.0, 0.0, STEPS), step_index=0)

    def hold(self, step: int) -> None:
        """The next calls belong to this step, from 0."""
        self.scheduler.step_index = step

    def step(self) -> None:
        """One call of the transformer."""
        self.transformer(**self.inputs, return_dict=False)


def competitor(label: str, methods: Sequence[Method]) -> Competitor:
    """A method with the steps to time.

    Args:
        label: its name in tables.
        methods: exactly one, which decides which keys are read.

    Raises:
        DitAttnError: another kind of method, several, or one that is dense by its density or at every step.
    """
    if len(methods) != 1 or not isinstance(methods[0], Reader):
        slugs = " + ".join(method.slug for method in methods) or "nothing"
        raise DitAttnError(f"--method {label}: {slugs} is not one method that decides which keys are read; give one")
    method = methods[0]
    if method.is_dense:
        raise DitAttnError(f"--method {label} keeps everything: dense attention is always measured; lower density")
    first, last = share(method.dense_steps, STEPS), STEPS - share(method.dense_last_steps, STEPS)
    if last - first < 1 + isinstance(method, ReTtention):
        raise DitAttnError(f"--method {label} has no sparse step among {STEPS}; lower dense_steps or dense_last_steps")
    if isinstance(method, ReTtention):
        method = dataclasses.replace(method, stagger=False)  # all layers refresh at one step, and none at the next
        names = ("refresh", "sparse")[: method.period]
        return Competitor(label, method, tuple(Phase(name, first + i) for i, name in enumerate(names)))
    return Competitor(label, method, (Phase("sparse", (first + last) // 2),))


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
            about = {
                "shape": list(call.q.shape),
                "masked": call.mask is not None,
                "calls_of_a_step": count,
                "layer": call.site.name,
                "sparse_kernel": choose_backend(call.q, _some_layout(call)).backend,
            }
            with _fastest_dense(call, device) as about["dense_kernels"]:
                parts = attention_parts(call, competitors, repeats, device, progress)
                del call  # its q, k and v are no part of a step's memory
                steps = step_times(held, competitors, repeats, progress)
    except (torch.OutOfMemoryError, MemoryError) as error:
        why = (str(error).splitlines() or ["out of memory"])[0][:120]
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


# -- one attention call ----------------------------------------------------------------------------------------------


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


def _some_layout(call: AttentionCall) -> BlockLayout:
    """A layout of the call's size, for what depends on the size alone."""
    seq_len = call.q.shape[1]
    return BlockLayout.dense(seq_len, seq_len, 128, 128, call.q.device)


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
    run = watched(lambda: executor.run(call, asked, executor.dense_rows(call)), device)
    return plan, run, float(engage.executed_share(call, asked))


def _call_at(call: AttentionCall, method: Reader, step: int, memory: dict[Any, Any]) -> AttentionCall:
    """The same call at another step, in a layer that the method does not keep dense."""
    real = call.site
    count = real.session.layer_count
    kept = {index % count for index in method.dense_layers}
    index = next((i for i in range(count) if i not in kept), real.index)
    site = SimpleNamespace(name=real.name, index=index, session=real.session, rows=(0, call.q.shape[0]), memory=memory)
    return dataclasses.replace(call, site=cast(Any, site), clock=Clock(run=1, step=step, total=STEPS))


@contextmanager
def _fastest_dense(call: AttentionCall, device: torch.device) -> Iterator[list[str]]:
    """Torch's dense kernels in the order of their speed on this call, so that the baseline is the best there is."""
    if device.type != "cuda":
        yield ["torch's choice"]
        return
    calls = bench.dense_calls(call.q, call.k, call.v)
    names = [name for name in _KERNELS if name in calls]
    times = dict(zip(names, bench.interleaved([calls[name] for name in names], 3, device)))
    order = sorted(names, key=lambda name: min(times[name]))
    with sdpa_kernel([*(_KERNELS[name] for name in order), SDPBackend.MATH], set_priority=True):
        yield order


# -- whole steps -----------------------------------------------------------------------------------------------------


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


def watched(call: Callable[[], Any], device: torch.device) -> tuple[float, float]:
    """Seconds on the wall and of the process's threads that one call takes; the latter are 0 on an accelerator."""
    before = time.process_time()
    wall = bench.timed(call, device)
    return 1e-3 * wall, time.process_time() - before if device.type == "cpu" else 0.0
