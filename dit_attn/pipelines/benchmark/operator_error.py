"""Measure how far methods are from dense attention, call by call.

Every attention call of a dense run is repeated by every method. The runs stay dense, so all methods see the same
queries, keys and values, and errors do not accumulate from layer to layer. Every method keeps its state from step to
step. Calls come from a pipeline, or from random fields with the structure of images.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, cast

import torch

from dit_attn.api import disable, observing
from dit_attn.eval import fidelity
from dit_attn.kernels.benchmark.synthetic import STRUCTURES, Grid, structured_qkv
from dit_attn.pipelines.compare import statistics
from dit_attn.processors.core import dispatch, executor
from dit_attn.processors.core.call import AttentionCall, Request
from dit_attn.processors.core.clock import Clock
from dit_attn.processors.core.parameters import untrained_modules
from dit_attn.processors.core.tokens import TokenLayout, visual_span
from dit_attn.processors.methods.base import Method

FLOOR = 1e-7  # an error of zero has no logarithm

Observer = Callable[[AttentionCall, Request, torch.Tensor], None]
CallSource = Callable[[int, Observer], None]
"""``source(run, observer)`` makes one dense run and shows every attention call of it to the observer."""


class OperatorProbe:
    """An attention observer that repeats the calls it sees with one method and records the error and the cost.

    Attributes:
        label: name of the method.
        method: its settings, dense steps and layers among them.
        step_stride: repeat the calls of one of so many steps, the middle one; 1 for methods with state.
        by_head: also record, for every head, its part of ``l2`` squared (``head_error2``) and its ``head_cost``.
        calls: one entry per sparse call: ``run``, ``layer``, ``step``, ``branch``, ``l2`` (relative L2 error of the
            visual rows), ``shift`` (error of their mean), ``cost`` (attention and ranking computed, as a fraction of
            dense) and ``seconds`` (selection included).
    """

    def __init__(self, label: str, method: Method, step_stride: int = 1, by_head: bool = False) -> None:
        self.label, self.method, self.step_stride, self.by_head = label, method, step_stride, by_head
        self.calls: list[dict[str, Any]] = []
        self._layers: dict[str, Any] = {}
        self._run = -1

    def begin(self, run: int) -> None:
        """Begin a new run: the state of the method is dropped."""
        self._layers.clear()
        self._run = run

    def __call__(self, call: AttentionCall, request: Request, exact: torch.Tensor) -> None:
        """Repeat ``call`` with the method and compare with its dense result ``exact`` (B, S, H, D)."""
        if executor.unsupported_reason(call) or call.clock.step % self.step_stride != self.step_stride // 2:
            return
        real = call.layer
        learned = untrained_modules(self.method, call)
        made = SimpleNamespace(name=real.name, index=real.index, state={}, stateless=None, learned=learned)
        layer = self._layers.setdefault(real.name, made)
        layer.rows = real.rows
        repeated = dataclasses.replace(call, layer=layer)
        wanted = Request()
        if executor.read_mask(repeated, wanted):
            return
        started = time.perf_counter()
        self.method.request(repeated, wanted)
        if wanted.empty:
            return
        out = executor.run(repeated, wanted, executor.dense_rows(repeated))
        seconds = time.perf_counter() - started
        visual = call.visual
        cost = float(dispatch.computed_fraction(repeated, wanted))
        self.calls.append(
            {
                **(_head_figures(wanted, out[:, visual], exact[:, visual], cost) if self.by_head else {}),
                "run": self._run,
                "layer": real.index,
                "step": call.clock.step,
                "branch": call.branches[0] if call.branches else "",
                "l2": fidelity.relative_l2(out[:, visual], exact[:, visual]),
                "shift": fidelity.mean_shift(out[:, visual], exact[:, visual]),
                "cost": cost,
                "seconds": seconds,
            }
        )


def _head_figures(request: Request, out: torch.Tensor, exact: torch.Tensor, cost: float) -> dict[str, list[float]]:
    """Squared error and cost of every head of the visual rows (B, Sv, H, D); the errors sum to the squared l2."""
    gap = (out - exact).double().square().sum((0, 1, 3)) / exact.double().square().sum().clamp(min=1e-30)
    costs = torch.full_like(gap, cost)
    if request.layout is not None and request.layout.kv_num_blocks.shape[1] == len(gap):
        kept = request.layout.kv_num_blocks.double().mean((0, 2)) / request.layout.nk
        costs += (kept - kept.mean()) * exact.shape[1] / request.layout.kv_len
    return {"head_error2": gap.tolist(), "head_cost": costs.tolist()}


def pipeline_source(
    pipe: Any, prompts: Sequence[str], *, seed: int = 0, call: dict[str, Any] | None = None
) -> CallSource:
    """Return dense runs of a stock pipeline, one per prompt.

    Args:
        pipe: the pipeline; enabled methods are disabled.
        prompts: texts.
        seed: of the first run; run n has ``seed + n``.
        call: further arguments of the pipeline's call.
    """
    disable(pipe)

    def source(run: int, observer: Observer) -> None:
        generator = torch.Generator("cpu").manual_seed(seed + run)
        with observing(pipe, observer), torch.no_grad():
            pipe(prompts[run], generator=generator, output_type="latent", **(call or {}))

    return source


def synthetic_source(grid: Grid, *, heads: int = 1, dim: int = 64, steps: int = 8, seed: int = 0) -> CallSource:
    """Return runs of random fields; every entry of :data:`~dit_attn.kernels.benchmark.synthetic.STRUCTURES` is a layer.

    Args:
        grid: (T, H, W) tokens.
        heads, dim: heads of a layer and their width.
        steps: denoising steps of a run.
        seed: of the first run; run n has ``seed + n``.
    """
    kind = "video" if grid[0] > 1 else "image"
    tokens = TokenLayout((visual_span(kind, grid),)).resolve(math.prod(grid))

    def source(run: int, observer: Observer) -> None:
        for index, (name, structure) in enumerate(STRUCTURES.items()):
            layer = cast(Any, SimpleNamespace(name=name, index=index, rows=(0, 1)))
            for step, qkv in enumerate(structured_qkv(structure, grid, heads, dim, steps, seed + run)):
                clock = Clock(run=run, step=step, total=steps)
                call = AttentionCall(
                    *qkv, None, None, False, layer, tokens, clock, layer_count=len(STRUCTURES)
                )  # fmt: skip
                observer(call, Request(), executor.dense_rows(call)(*qkv, None))

    return source


def measure_operators(source: CallSource, runs: int, probes: Sequence[OperatorProbe]) -> dict[str, Any]:
    """Show every attention call of dense runs to every probe.

    Args:
        source: makes the runs.
        runs: how many; intervals are over runs.
        probes: collect the results.

    Returns:
        ``calls`` (their number), ``dense_seconds`` (mean time of torch's attention on the same calls) and ``tokens``
        (sequence lengths).
    """
    dense: list[float] = []
    lengths: set[int] = set()

    def observe(call: AttentionCall, request: Request, out: torch.Tensor) -> None:
        if executor.unsupported_reason(call):
            return
        for probe in probes:
            probe(call, request, out)
        started = time.perf_counter()
        executor.dense_rows(call)(call.q, call.k, call.v, call.mask)
        dense.append(time.perf_counter() - started)
        lengths.add(call.q.shape[1])

    for run in range(runs):
        for probe in probes:
            probe.begin(run)
        with torch.no_grad():
            source(run, observe)
    return {"calls": len(dense), "dense_seconds": _mean(dense), "tokens": sorted(lengths)}


def probe_row(probe: OperatorProbe) -> dict[str, Any]:
    """Summarize the results of a probe.

    Returns:
        ``label``, ``method``, ``calls``, ``cost`` and ``seconds`` (means over all calls, refreshes included), ``l2``
        and ``shift`` (geometric means over the calls that are not exact), ``rms`` (root of the mean square of ``l2``
        over all calls), each with a 95 % interval over runs, and ``by_layer`` (geometric means of ``l2``).
    """
    inexact = [result for result in probe.calls if result["cost"] < 1.0]
    layers = sorted({result["layer"] for result in inexact})
    return {
        "label": probe.label,
        "method": probe.method.to_dict(),
        "calls": len(probe.calls),
        "cost": _mean([result["cost"] for result in probe.calls]),
        "seconds": _mean([result["seconds"] for result in probe.calls]),
        "l2": mean_over_runs(log_errors(probe.calls, "l2")),
        "shift": mean_over_runs(log_errors(probe.calls, "shift")),
        "rms": mean_over_runs(log_errors(probe.calls, "rms")),
        "by_layer": {
            layer: math.exp(_mean([_log(c["l2"]) for c in inexact if c["layer"] == layer]) or 0.0) for layer in layers
        },
    }


def log_errors(calls: Sequence[dict[str, Any]], key: str) -> dict[int, float]:
    """Return the logarithm of the mean error of every run.

    Args:
        calls: see :attr:`OperatorProbe.calls`.
        key: ``"l2"`` or ``"shift"`` for the geometric mean over inexact calls, ``"rms"`` for the root mean square of
            ``l2`` over all calls.
    """
    by_run: dict[int, list[float]] = {}
    for call in calls:
        if key == "rms":
            by_run.setdefault(call["run"], []).append(call["l2"] ** 2)
        elif call["cost"] < 1.0:
            by_run.setdefault(call["run"], []).append(_log(call[key]))
    means = {run: sum(values) / len(values) for run, values in by_run.items()}
    return {run: 0.5 * math.log(max(mean, FLOOR**2)) for run, mean in means.items()} if key == "rms" else means


def mean_over_runs(logs: dict[int, float]) -> dict[str, Any] | None:
    """Return the geometric mean of values given as logarithms, with its 95 % bootstrap interval over runs.

    Returns:
        ``value``, ``ci95`` and ``n``; ``None`` without values.
    """
    figure = statistics.mean_figure(list(logs.values()))
    if figure is None:
        return None
    interval = figure["ci95"] and [math.exp(end) for end in figure["ci95"]]
    return {"value": math.exp(figure["value"]), "ci95": interval, "n": figure["n"]}


def _log(value: float) -> float:
    return math.log(max(value, FLOOR))


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
