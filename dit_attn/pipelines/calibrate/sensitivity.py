"""Measure what sparse attention does to the result, layer by layer and part by part of the run.

Runs are compared with the dense run of the same prompt and noise:

* one dense run shows every attention call at several densities: error e(l, p, d) of the output of layer l in part p of
  the run, and cost c(l, p, d), the attention computed as a fraction of dense;
* one run with each layer alone sparse, one with each part alone sparse, and one with everything sparse, all at one
  density d0, give the effects on the final latents.

:mod:`dit_attn.pipelines.calibrate.allocation` chooses densities from these measurements.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch

from dit_attn.api import enabled, observing
from dit_attn.errors import DitAttnError
from dit_attn.pipelines.benchmark import operator_error
from dit_attn.pipelines.transformers import transformers_of
from dit_attn.processors.attach.attach import session_of
from dit_attn.processors.attach.summary import summarize
from dit_attn.processors.core import executor
from dit_attn.processors.core.call import AttentionCall, Request
from dit_attn.processors.methods.sparse import SparseMethod, as_sparse, part_of_run

DENSITIES = (0.75, 0.5, 0.35, 0.25, 0.18, 0.125, 0.0625)
PARTS = 10
FLOOR = 1e-14  # a squared error of zero has no logarithm
MAX_ERROR = 10.0  # relative error of a result that is NaN, infinite or further off than that

RunItem = Callable[[str], torch.Tensor]
"""``run_item(name)`` runs the pipeline for the item of that name, with what is enabled; returns its final latents."""


@dataclass(frozen=True)
class CalibrationPlan:
    """What a calibration measures.

    Attributes:
        method: the settings to start from; their density is d0.
        parts: equal parts of the run, each with densities of its own.
        densities: of the local measurement, d0 among them, descending.
        step_stride: the local measurement looks at one of so many steps.
        by_head: whether the local measurement tells the heads of a layer apart, which then get densities of their own.
    """

    method: SparseMethod
    parts: int
    densities: tuple[float, ...]
    step_stride: int = 1
    by_head: bool = False

    def local_key(self, item: str) -> str:
        """Return the key of the local measurement of an item in the log."""
        return f"{'heads' if self.by_head else 'local'}/{item}"

    @property
    def density(self) -> float:
        """The density d0 of :attr:`method`."""
        return float(cast(Any, self.method).density)

    @property
    def unrestricted(self) -> SparseMethod:
        """The method without the dense steps and layers that the densities by layer and part replace."""
        changes: dict[str, Any] = {"dense_layers": (), "max_error": None}
        changes |= {"dense_steps": 0, "dense_last_steps": 0} if self.parts > 1 else {}
        return dataclasses.replace(self.method, **changes)

    def with_density(self, density: float) -> SparseMethod:
        """Return :attr:`unrestricted` with one density."""
        changes: dict[str, Any] = {"density": density}
        return dataclasses.replace(self.unrestricted, **changes)

    def with_densities(self, densities: np.ndarray) -> SparseMethod:
        """Return the method with (parts, layers) or (parts, layers, heads) densities."""
        rows = densities.reshape(-1, *densities.shape[2:]).tolist()
        flat = tuple(tuple(row) if isinstance(row, list) else row for row in rows)
        return dataclasses.replace(self.unrestricted, densities=flat, parts=self.parts)


def make_plan(
    method: Any,
    parts: int | None = None,
    densities: Sequence[float] | None = None,
    step_stride: int | None = None,
    steps: int | None = None,
    by_head: bool = False,
) -> CalibrationPlan:
    """Make a checked plan.

    Args:
        method: a :class:`SparseMethod` with a density.
        parts: parts of the run; ``None`` for :data:`PARTS`, or 1 where the method has a schedule of its own.
        densities: to measure; ``None`` for :data:`DENSITIES`.
        step_stride: ``None`` for one step of every part, or every step where the method has state.
        steps: denoising steps of a run, where they are known.
        by_head: whether every head gets densities of its own.

    Raises:
        DitAttnError: the method has no density to calibrate, or a number is out of range.
    """
    if as_sparse(method) is None or getattr(method, "density", None) is None:
        raise DitAttnError(
            f"{getattr(method, 'slug', method)} has no density to calibrate; give one sparse method with a density "
            "(and no top_p)"
        )
    deciding = ("densities", "top_p", "target_error")
    name = next((name for name in deciding if getattr(method, name, None) is not None), None)
    if name is not None:
        raise DitAttnError(f"{method.slug}.{name} is set, which calibration would replace; give density alone")
    if isinstance(cast(Any, method).density, tuple):
        raise DitAttnError(f"{method.slug}.density has a number for each head; calibrate from one number for all heads")
    density = float(cast(Any, method).density)
    measured = sorted({*(densities or DENSITIES), density}, reverse=True)
    for value in measured:
        if not 0.0 < value < 1.0:
            raise DitAttnError(f"densities to measure must be above 0 and below 1, got {value!r}")
    if len(measured) < 2:
        raise DitAttnError(f"one density to measure is not enough, got {measured[0]}; give at least two")
    if parts is not None and parts > 1 and not method.by_step:
        raise DitAttnError(f"{method.slug} has its own schedule over the steps, so parts must be 1, got {parts}")
    parts = parts or (min(PARTS, steps or PARTS) if method.by_step else 1)
    if steps is not None and parts > steps:
        raise DitAttnError(f"a run of {steps} steps has no {parts} parts; give at most {steps}")
    if step_stride is None:
        keeps = not method.by_step or method.cache_bytes(4096, 1, 64, 4) > 0
        step_stride = max(1, (steps or parts) // parts) if parts > 1 and not keeps else 1
    return CalibrationPlan(method, parts, tuple(measured), step_stride, by_head)


# -- measuring ---------------------------------------------------------------------------------------------------------


class CallCounter:
    """An attention observer that counts the calls that can be made sparse, by part and layer.

    Attributes:
        calls, measured: calls of (part, layer), and those at the steps that are measured.
        part_of_step: part of every step.
        layers, tokens, steps: of the run.
    """

    def __init__(self, parts: int, step_stride: int) -> None:
        self.parts, self.step_stride = parts, step_stride
        self.calls: Counter[tuple[int, int]] = Counter()
        self.measured: Counter[tuple[int, int]] = Counter()
        self.part_of_step: dict[int, int] = {}
        self.layers = self.tokens = self.steps = 0

    def __call__(self, call: AttentionCall, request: Request, exact: torch.Tensor) -> None:
        """Count ``call``."""
        if executor.unsupported_reason(call):
            return
        step = call.clock.step
        part = self.part_of_step[step] = part_of_run(call.clock, self.parts)
        self.calls[part, call.layer.index] += 1
        self.measured[part, call.layer.index] += step % self.step_stride == self.step_stride // 2
        self.layers = call.layer_count
        self.steps = max(self.steps, call.clock.total or step + 1)
        self.tokens = call.q.shape[1]


def measure_locally(
    pipe: Any, run_item: RunItem, item: str, plan: CalibrationPlan
) -> tuple[dict[str, Any], torch.Tensor]:
    """Return squared error and cost of every density, part and layer; and the dense latents.

    Args:
        pipe: a stock pipeline with nothing enabled.
        run_item: runs ``pipe`` for an item and returns its final latents.
        item: name of the item.
        plan: what to measure.

    Raises:
        DitAttnError: the dense run is not finite, or has no attention call that can be made sparse.
    """
    counter = CallCounter(plan.parts, plan.step_stride)
    probes = [
        operator_error.OperatorProbe(str(density), plan.with_density(density), plan.step_stride, plan.by_head)
        for density in plan.densities
    ]

    def observe(call: AttentionCall, request: Request, exact: torch.Tensor) -> None:
        counter(call, request, exact)
        for probe in probes:
            probe(call, request, exact)

    with observing(pipe, observe), torch.no_grad():
        latents = run_item(item)
    if not counter.calls:
        raise DitAttnError(
            "no attention call of this run can be made sparse (`dit-attn explain` says why); give a larger size"
        )
    shape = (plan.parts, counter.layers)
    calls, measured = (_as_table(counts, shape) for counts in (counter.calls, counter.measured))
    if not measured.all():
        raise DitAttnError(
            f"looking at one step of {plan.step_stride} leaves parts of a run of {counter.steps} steps without a "
            "measurement; give a smaller --every or fewer --parts"
        )
    errors, costs = [], []
    for probe in probes:
        error, extra = np.zeros(shape), np.zeros(shape)
        for result in probe.calls:
            cell = counter.part_of_step[result["step"]], result["layer"]
            error[cell] += result["l2"] ** 2
            extra[cell] += result["cost"] - 1.0
        errors.append((error / measured).tolist())
        costs.append((1.0 + extra / measured).tolist())
    _check_finite(latents, item)
    sizes = {"calls": calls.tolist(), "steps": counter.steps, "tokens": counter.tokens}
    by_head = _heads_apart(probes, counter, measured) if plan.by_head else {}
    return {"error2": errors, "cost": costs, **by_head, **sizes}, latents


def _heads_apart(
    probes: Sequence[operator_error.OperatorProbe], counter: CallCounter, measured: np.ndarray
) -> dict[str, Any]:
    """Squared error and cost of every density, part, layer and head, means over the measured calls.

    Raises:
        DitAttnError: the layers have different numbers of heads.
    """
    counts = {len(result["head_cost"]) for probe in probes for result in probe.calls}
    if len(counts) != 1:
        raise DitAttnError(f"the layers have {sorted(counts)} heads; calibrate without telling heads apart")
    shape = (*measured.shape, counts.pop())
    errors, costs = [], []
    for probe in probes:
        error, extra = np.zeros(shape), np.zeros(shape)
        for result in probe.calls:
            cell = counter.part_of_step[result["step"]], result["layer"]
            error[cell] += result["head_error2"]
            extra[cell] += np.array(result["head_cost"]) - 1.0
        errors.append((error / measured[..., None]).tolist())
        costs.append((1.0 + extra / measured[..., None]).tolist())
    return {"head_error2": errors, "head_cost": costs}


def _as_table(counts: Counter[tuple[int, int]], shape: tuple[int, int]) -> np.ndarray:
    out = np.zeros(shape)
    for cell, count in counts.items():
        out[cell] = count
    return out


def dense_latents(run_item: RunItem, item: str) -> torch.Tensor:
    """Run an item with nothing enabled and return its final latents.

    Raises:
        DitAttnError: they are not finite.
    """
    with torch.no_grad():
        return _check_finite(run_item(item), item)


def _check_finite(latents: torch.Tensor, item: str) -> torch.Tensor:
    if not torch.isfinite(latents).all():
        raise DitAttnError(f"the dense run of {item} is NaN or infinite, so nothing compares with it; try --dtype fp32")
    return latents


def run_sparse(pipe: Any, run_item: RunItem, item: str, method: SparseMethod, dense: torch.Tensor) -> dict[str, float]:
    """Run an item with a method and return its ``error`` and ``cost``.

    Args:
        pipe: a stock pipeline.
        run_item: runs ``pipe`` for an item and returns its final latents.
        item: name of the item.
        method: enabled for the run.
        dense: final latents of the dense run.

    Returns:
        ``error``: relative L2 distance of the final latents from ``dense``, at most :data:`MAX_ERROR`. ``cost``:
        attention computed, as a fraction of the dense run; dense calls and the ranking of blocks are counted.
    """
    with enabled(pipe, method), torch.no_grad():
        latents = run_item(item)
        models = transformers_of(pipe)
        report = summarize({name: session for name, model in models.items() if (session := session_of(model))})
    gap = float((latents.double() - dense.double()).norm() / dense.double().norm().clamp(min=1e-30))
    cost = report.run_density
    return {
        "error": min(gap, MAX_ERROR) if math.isfinite(gap) else MAX_ERROR,
        "cost": 1.0 if cost is None else float(cost),
    }
