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
from dit_attn.kernels.dense import dense_with_lse
from dit_attn.pipelines.compare import statistics
from dit_attn.processors.core import dispatch, executor
from dit_attn.processors.core.call import AttentionCall, Request
from dit_attn.processors.core.clock import Clock
from dit_attn.processors.core.parameters import untrained_modules
from dit_attn.processors.core.tokens import TokenLayout, visual_span
from dit_attn.processors.methods.base import Method

FLOOR = 1e-7  # an error of zero has no logarithm
ERRORS = ("l2", "shift", "angle", "lse", "rms")

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
            visual rows), ``shift`` (error of their mean), ``angle`` (1 less their cosine), ``lse`` (mean absolute error
            of their log-sum-exp, where the method has one), ``cost`` (attention and ranking computed, as a fraction of
            dense), ``seconds`` (selection included) and ``choosing`` (seconds of the selection).
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

    def __call__(
        self, call: AttentionCall, request: Request, exact: torch.Tensor, lse: torch.Tensor | None = None
    ) -> None:
        """Repeat ``call`` with the method and compare with its dense result.

        Args:
            call: the attention call.
            request: what was computed.
            exact: (B, S, H, D) dense result.
            lse: (B, H, Sv) dense log-sum-exp of the visual rows; ``None`` compares none.
        """
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
        choosing = time.perf_counter() - started
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
                "angle": max(0.0, 1.0 - fidelity.cosine(out[:, visual], exact[:, visual])),
                **_lse_error(repeated, wanted, lse),
                "cost": cost,
                "seconds": seconds,
                "choosing": choosing,
            }
        )


def _lse_error(call: AttentionCall, request: Request, exact: torch.Tensor | None) -> dict[str, float]:
    """Mean absolute error of the log-sum-exp of the visual rows, in natural units; empty where there is none."""
    found = None if exact is None else executor.visual_lse(call, request)
    if found is None or exact is None:
        return {}
    return {"lse": float((found.double() - exact.double()).abs().mean())}


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
        lse = _dense_lse(call)
        for probe in probes:
            probe(call, request, out, lse)
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


def _dense_lse(call: AttentionCall) -> torch.Tensor | None:
    """(B, H, Sv) log-sum-exp of the visual rows in dense attention; ``None`` where the mask has no form for it."""
    request = Request()
    if executor.read_mask(call, request):
        return None
    masks = {"key_mask": request.key_mask, "key_bias": request.key_bias}
    return dense_with_lse(call.q[:, call.visual], call.k, call.v, scale=call.scale, **masks)[1]


def probe_row(probe: OperatorProbe) -> dict[str, Any]:
    """Summarize the results of a probe.

    Returns:
        ``label``, ``method``, ``calls``, ``cost``, ``seconds`` and ``choosing`` (means over all calls, refreshes
        included), ``l2``, ``shift``, ``angle`` and ``lse`` (geometric means over the calls that are not exact), ``rms``
        (root of the mean square of ``l2`` over all calls), each with a 95 % interval over runs, and ``by_layer``
        (geometric means of ``l2``).
    """
    inexact = [result for result in probe.calls if result["cost"] < 1.0]
    layers = sorted({result["layer"] for result in inexact})
    return {
        "label": probe.label,
        "method": probe.method.to_dict(),
        "calls": len(probe.calls),
        "cost": _mean([result["cost"] for result in probe.calls]),
        "seconds": _mean([result["seconds"] for result in probe.calls]),
        "choosing": _mean([result["choosing"] for result in probe.calls]),
        **{key: mean_over_runs(log_errors(probe.calls, key)) for key in ERRORS},
        "by_layer": {
            layer: math.exp(_mean([_log(c["l2"]) for c in inexact if c["layer"] == layer]) or 0.0) for layer in layers
        },
    }


def log_errors(calls: Sequence[dict[str, Any]], key: str) -> dict[int, float]:
    """Return the logarithm of the mean error of every run.

    Args:
        calls: see :attr:`OperatorProbe.calls`.
        key: ``"rms"`` for the root mean square of ``l2`` over all calls; another of :data:`ERRORS` for the geometric
            mean over inexact calls, those that have it.
    """
    by_run: dict[int, list[float]] = {}
    for call in calls:
        if key == "rms":
            by_run.setdefault(call["run"], []).append(call["l2"] ** 2)
        elif call["cost"] < 1.0 and key in call:
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
