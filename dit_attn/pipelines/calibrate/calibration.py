"""Calibrate densities by layer and part of the run from a few prompts and a budget of cost or of error.

    from dit_attn.pipelines.calibrate import calibrate, make_plan

    plan = make_plan(dit_attn.BlockSparse(density=0.25), steps=20)
    result = calibrate(pipe, run_item, ["a cat", "a dog"], plan, check=["a bird"])
    dit_attn.enable(pipe, result.method)

``run_item(name)`` runs the pipeline for one item and returns its final latents.
:mod:`~dit_attn.pipelines.calibrate.runs` says which runs there are, :mod:`~dit_attn.pipelines.calibrate.sensitivity`
measures, :mod:`~dit_attn.pipelines.calibrate.allocation` chooses, and runs of other items compare the result with one
density for all at the same cost.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dit_attn.api import disable
from dit_attn.errors import DitAttnError
from dit_attn.pipelines.benchmark import operator_error
from dit_attn.pipelines.calibrate import allocation
from dit_attn.pipelines.calibrate.runs import RequestedRuns, RunRequest, layer_count, measure_items
from dit_attn.pipelines.calibrate.sensitivity import CalibrationPlan, RunItem
from dit_attn.pipelines.measurement_log import MeasurementLog
from dit_attn.pipelines.run import Answers, answered_here
from dit_attn.processors.methods.sparse import SparseMethod

CALIBRATED, UNIFORM, BY_LAYER = "calibrated", "uniform", "by layer"


@dataclass(frozen=True)
class Calibration:
    """Result of a calibration.

    Attributes:
        method: the calibrated settings, to ``enable`` or save.
        densities: (parts, layers) its densities, (parts, layers, heads) where heads are told apart.
        uniform: the same method with one density, of at least the same cost.
        expected: for ``"calibrated"`` and ``"uniform"``: ``error`` (relative L2 of the final latents) and ``cost``
            (attention computed, as a fraction of the dense run).
        checked: the same, measured on items that were not calibrated on, with 95 % intervals, and the ``ratio`` of the
            errors; where heads are told apart, also for ``"by layer"``, the densities without heads at the same cost,
            with the ``head_ratio`` of the errors; ``None`` without such items.
    """

    method: SparseMethod
    densities: np.ndarray
    uniform: SparseMethod
    expected: dict[str, dict[str, float]]
    checked: dict[str, Any] | None


def calibrate(
    pipe: Any,
    run_item: RunItem,
    items: Sequence[str],
    plan: CalibrationPlan,
    log: MeasurementLog | None = None,
    *,
    check: Sequence[str] = (),
    cost: float | None = None,
    error: float | None = None,
    provenance: dict[str, Any] | None = None,
    on_progress: Callable[[str], None] = lambda text: None,
    answers: Answers | None = None,
) -> Calibration:
    """Measure what the log lacks, choose the densities, and check them on other items.

    Args:
        pipe: a stock pipeline; enabled methods are disabled.
        run_item: runs ``pipe`` for an item and returns its final latents.
        items: names of the items to calibrate on.
        plan: what to measure, see :func:`~dit_attn.pipelines.calibrate.sensitivity.make_plan`.
        log: earlier measurements, and where new ones go; ``None`` keeps them in memory.
        check: names of further items to compare on.
        cost: budget: attention computed, as a fraction of the dense run. Without a budget that of ``plan.method``.
        error: budget instead of ``cost``: expected relative error of the final latents.
        provenance: JSON values that are added to ``method.calibration``.
        on_progress: called with a line of text before every run that is made in this process.
        answers: makes the runs elsewhere, and ``pipe`` needs no weights then; ``None``: in this process.

    Raises:
        JobFailed: a run that was made elsewhere.
        DitAttnError: two budgets, a budget that no densities meet, or no attention call that can be made sparse.
    """
    if cost is not None and error is not None:
        raise DitAttnError(f"a budget is a cost or an error, not both; got {cost:g} and {error:g}")
    log = MeasurementLog() if log is None else log
    disable(pipe)
    if answers is None:
        answers = answered_here(RequestedRuns(pipe, run_item, plan, on_progress))
    measure_items(items, plan, layer_count(pipe), log, answers)
    model = allocation.fit_cost_model(log, items, plan)
    if cost is None and error is None:
        cost = model.expect_uniform(plan.method, plan.density, plan.parts)[1]
    densities = allocation.allocate(model, cost=cost, error=error)
    calibrated_figures = allocation.expect(model, densities)
    uniform = allocation.uniform_at_cost(model, plan, calibrated_figures[1])
    uniform_figures = model.expect_uniform(uniform, float(getattr(uniform, "density")), plan.parts)  # noqa: B009
    pairs = ((CALIBRATED, calibrated_figures), (UNIFORM, uniform_figures))
    expected = {label: {"error": figures[0], "cost": figures[1]} for label, figures in pairs}
    if plan.by_head:
        densities = densities.reshape(plan.parts, -1, model.heads)
    checked = None
    if check:
        methods = {CALIBRATED: plan.with_densities(densities), UNIFORM: uniform}
        if plan.by_head:
            layers = allocation.fit_cost_model(log, items, plan, by_head=False)
            methods[BY_LAYER] = plan.with_densities(allocation.allocate(layers, cost=calibrated_figures[1]))
        check_items(check, methods, log, answers)
        checked = compare_checks(log, check, CALIBRATED, UNIFORM)
        if plan.by_head:
            apart = compare_checks(log, check, CALIBRATED, BY_LAYER)
            checked |= {BY_LAYER: apart[BY_LAYER], "head_ratio": apart["ratio"]}
    record = {
        "transformer": type(pipe.transformer).__name__,
        "layers": int(densities.shape[1]),
        **(provenance or {}),
        "uniform": uniform.to_dict(),
        "expected": expected,
        "checked": checked,
    }
    changes: dict[str, Any] = {"max_error": plan.method.max_error, "calibration": record}
    method = dataclasses.replace(plan.with_densities(densities), **changes)
    return Calibration(method, densities, uniform, expected, checked)


def check_items(items: Sequence[str], methods: dict[str, SparseMethod], log: MeasurementLog, answers: Answers) -> None:
    """Run items dense and with every method; log ``error`` and ``cost`` under ``check/ITEM/LABEL``.

    Args:
        items: names of the items.
        methods: by label.
        log: earlier measurements of the same settings are reused.
        answers: answers a :class:`~dit_attn.pipelines.calibrate.runs.RunRequest`.
    """
    wanted: dict[str, RunRequest] = {}
    labels: dict[str, str] = {}
    for item in items:
        for label, method in methods.items():
            key = f"check/{item}/{json.dumps(method.to_dict() | {'calibration': None}, sort_keys=True)}"
            labels[f"check/{item}/{label}"] = key
            wanted[key] = RunRequest(item, label, method.to_dict())
    missing = [key for key in wanted if key not in log.rows]
    for position, found in answers([dataclasses.asdict(wanted[key]) for key in missing]):
        log.add(missing[position], found)
    log.rows |= {name: log.rows[key] for name, key in labels.items()}


def compare_checks(log: MeasurementLog, items: Sequence[str], ours: str, theirs: str) -> dict[str, Any]:
    """Compare the errors and costs of two checked methods, with 95 % bootstrap intervals over items.

    Args:
        log: has the measurements of :func:`check_items`.
        items: names of the checked items.
        ours, theirs: labels.

    Returns:
        By label ``error`` (geometric mean) and ``cost`` (mean); ``ratio``: error of ``ours`` over that of ``theirs``.
    """
    checks = {label: [log.rows[f"check/{item}/{label}"] for item in items] for label in (ours, theirs)}
    logs = {
        label: {i: math.log(max(row["error"], operator_error.FLOOR)) for i, row in enumerate(rows)}
        for label, rows in checks.items()
    }
    out: dict[str, Any] = {
        label: {
            "error": operator_error.mean_over_runs(logs[label]),
            "cost": float(np.mean([row["cost"] for row in rows])),
        }
        for label, rows in checks.items()
    }
    return out | {"ratio": operator_error.mean_over_runs({i: logs[ours][i] - logs[theirs][i] for i in logs[ours]})}
