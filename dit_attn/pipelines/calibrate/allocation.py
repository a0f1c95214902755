"""Choose densities by layer and part of the run from the measurements of a calibration.

The local squared errors at the density d0 are scaled so that the sums over layers and over parts match the effects
measured on the final latents (iterative proportional fitting: Deming and Stephan 1940). That gives every cell (layer l,
part p) its contribution m(l, p) to the final squared error E^2(d0); at another density d it is
``m(l, p) E^2(d0) e^2(l, p, d) / e^2(l, p, d0)``. Density is then spent where a unit of cost removes most error, along
the lower convex hull of every cell (Everett 1963, generalised Lagrange multipliers). Where heads are told apart, each
is a cell: ``m(l, p)`` divides over the heads of a layer as their local squared errors at d0 do.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dit_attn.errors import DitAttnError
from dit_attn.kernels.selection.budget import blocks_of_density
from dit_attn.pipelines.calibrate.sensitivity import FLOOR, CalibrationPlan
from dit_attn.pipelines.measurement_log import MeasurementLog
from dit_attn.processors.methods.base import resolve_count
from dit_attn.processors.methods.sparse import SparseMethod

MAX_DENSITIES = 64  # densities to choose from


@dataclass(frozen=True)
class CostModel:
    """Expected error and cost of every cell (part, layer) at every density.

    Attributes:
        densities: (K,) ascending; the last is 1, dense.
        error2: (K, parts, layers) contribution to the squared relative error of the final latents.
        cost: (K, parts, layers) attention computed, as a fraction of the whole dense run; all cells dense sum to 1.
        steps: denoising steps of a run.
        heads: heads that are told apart; a layer then has so many columns, one after another, in place of one.
    """

    densities: np.ndarray
    error2: np.ndarray
    cost: np.ndarray
    steps: int
    heads: int = 1

    def expect_uniform(self, method: SparseMethod, density: float, parts: int) -> tuple[float, float]:
        """Return the expected error and cost of one density everywhere but at the dense steps and layers of ``method``.

        Args:
            method: gives ``dense_steps``, ``dense_last_steps`` and ``dense_layers``.
            density: one of :attr:`densities`.
            parts: parts of the run.
        """
        index = int(np.searchsorted(self.densities, density - 1e-9))
        sparse_fraction = np.ones(self.cost.shape[1:])
        if parts > 1:
            steps = np.arange(self.steps)
            first = resolve_count(method.dense_steps, self.steps)
            last = self.steps - resolve_count(method.dense_last_steps, self.steps)
            sparse = (steps >= first) & (steps < last)
            part = np.minimum(steps * parts // self.steps, parts - 1)
            sparse_fraction *= np.array([sparse[part == p].mean() for p in range(parts)])[:, None]
        for layer in method.dense_layers:
            first = layer % (self.cost.shape[2] // self.heads) * self.heads
            sparse_fraction[:, first : first + self.heads] = 0.0
        cost = sparse_fraction * self.cost[index] + (1.0 - sparse_fraction) * self.cost[-1]
        return math.sqrt(float((sparse_fraction * self.error2[index]).sum())), float(cost.sum())


def fit_cost_model(
    log: MeasurementLog, items: Sequence[str], plan: CalibrationPlan, by_head: bool | None = None
) -> CostModel:
    """Fit the cost model to the measurements of ``items``.

    Squared errors are averaged over items geometrically, so that one item with a large error does not dominate.

    Args:
        log: the measurements, see :func:`~dit_attn.pipelines.calibrate.sensitivity.measure_item`.
        items: names of the measured items.
        plan: what was measured.
        by_head: whether heads are cells of their own; ``None`` for ``plan.by_head``.
    """
    local = [log.rows[plan.local_key(item)] for item in items]
    error2 = _geometric_mean([np.maximum(measured["error2"], FLOOR) for measured in local])
    cost = np.mean([measured["cost"] for measured in local], 0)
    weight = np.mean([measured["calls"] for measured in local], 0)
    base = plan.densities.index(plan.density)

    def effect(kind: str, count: int) -> np.ndarray:
        rows = [[log.rows[f"{kind}/{item}/{n}"] for n in range(count)] for item in items]
        return _geometric_mean([np.maximum(np.square(row), FLOOR) for row in rows])

    total = _geometric_mean([np.maximum(np.square([log.rows[f"all/{item}"]]), FLOOR) for item in items])[0]
    layers = effect("layer", error2.shape[2])
    parts = effect("part", plan.parts) if plan.parts > 1 else np.ones(1)
    cells = fit_margins(error2[base] * weight, layers / layers.sum(), parts / parts.sum()) * total
    scaled = cells * error2 / error2[base]
    weight = weight / weight.sum()
    if not (plan.by_head if by_head is None else by_head):
        return _interpolate(plan, scaled, cost * weight, weight, local[0])
    head_error2 = _geometric_mean([np.maximum(measured["head_error2"], FLOOR) for measured in local])
    heads = head_error2.shape[3]
    contribution = cells[..., None] * head_error2 / head_error2[base].sum(-1, keepdims=True)
    head_cost = np.mean([measured["head_cost"] for measured in local], 0) * weight[..., None] / heads
    dense = np.repeat(weight / heads, heads, -1)
    contribution, head_cost = (table.reshape(*error2.shape[:2], -1) for table in (contribution, head_cost))
    return dataclasses.replace(_interpolate(plan, contribution, head_cost, dense, local[0]), heads=heads)


def fit_margins(cells: np.ndarray, layers: np.ndarray, parts: np.ndarray, rounds: int = 200) -> np.ndarray:
    """Scale the rows and columns of a table until it has the given sums (iterative proportional fitting).

    Args:
        cells: (parts, layers), positive.
        layers: (layers,) wanted column sums.
        parts: (parts,) wanted row sums, of the same total.
        rounds: iterations.
    """
    for _ in range(rounds):
        cells = cells * (parts / cells.sum(1))[:, None]
        cells = cells * (layers / cells.sum(0))
    return cells


def _interpolate(
    plan: CalibrationPlan, error2: np.ndarray, cost: np.ndarray, dense: np.ndarray, measured: dict[str, Any]
) -> CostModel:
    """Add densities of whole blocks between the measured ones: errors log-linear, costs linear in the block count."""
    blocks = math.ceil(measured["tokens"] / plan.method.kv_block)
    counts = np.array([blocks_of_density(density, blocks) for density in plan.densities])
    counts, places = np.unique(counts, return_index=True)
    error2, cost = error2[places], cost[places]
    wanted = np.geomspace(counts[0], counts[-1], MAX_DENSITIES)
    chosen = np.unique(np.concatenate([counts, np.round(wanted)]))

    def between(values: np.ndarray, scale: Callable[[np.ndarray], Any]) -> np.ndarray:
        return np.apply_along_axis(lambda column: np.interp(scale(chosen), scale(counts), column), 0, values)

    errors = np.exp(between(np.log(np.maximum(error2, FLOOR)), np.log))
    costs = between(cost, np.asarray)
    sparse = chosen < blocks
    return CostModel(
        np.append(chosen[sparse] / blocks, 1.0), np.concatenate([errors[sparse], np.zeros_like(errors[:1])]),
        np.concatenate([costs[sparse], dense[None]]), measured["steps"],
    )  # fmt: skip


def _geometric_mean(values: Sequence[Any]) -> np.ndarray:
    return np.exp(np.mean(np.log(np.asarray(values)), 0))


def allocate(model: CostModel, *, cost: float | None = None, error: float | None = None) -> np.ndarray:
    """Choose the densities with the least expected error for a cost, or with the least cost for an error.

    Args:
        model: expected errors and costs.
        cost: upper bound of the attention computed, as a fraction of the dense run.
        error: upper bound of the expected relative error of the final latents.

    Returns:
        (parts, layers) densities.

    Raises:
        DitAttnError: ``cost`` is below that of the lowest density.
    """
    shape = model.cost.shape[1:]
    floor = model.cost.min(0).sum()
    if cost is not None and cost < floor - 1e-9:
        raise DitAttnError(
            f"--cost {cost:g} is below {floor:.3f}, what the lowest measured density ({model.densities[0]:g}) costs in "
            "every layer and step; give more, or lower --densities"
        )
    choice = np.zeros(shape, dtype=int)
    steps = []
    for cell in np.ndindex(shape):
        hull = _lower_hull(model.cost[(slice(None), *cell)], model.error2[(slice(None), *cell)])
        choice[cell] = hull[0]
        for before, after in itertools.pairwise(hull):
            paid = model.cost[(after, *cell)] - model.cost[(before, *cell)]
            gain = model.error2[(before, *cell)] - model.error2[(after, *cell)]
            steps.append((gain / paid, paid, cell, before, after))
    spent, left = float(floor), _total(model.error2, choice)
    for gain, paid, cell, before, after in sorted(steps, key=lambda step: -step[0]):
        if error is not None and math.sqrt(max(left, 0.0)) <= error:
            break
        if choice[cell] != before or (cost is not None and spent + paid > cost + 1e-9):
            continue
        choice[cell] = after
        spent, left = spent + paid, left - gain * paid
    return model.densities[choice]


def _lower_hull(cost: np.ndarray, error2: np.ndarray) -> list[int]:
    """Indices of the lower convex hull, by rising cost and falling error."""
    hull: list[int] = []
    for i in np.lexsort((error2, cost)):
        if hull and error2[i] >= error2[hull[-1]]:
            continue
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            if (error2[a] - error2[b]) * (cost[i] - cost[b]) > (error2[b] - error2[i]) * (cost[b] - cost[a]):
                break
            hull.pop()
        hull.append(int(i))
    return hull


def _total(values: np.ndarray, choice: np.ndarray) -> float:
    return float(np.take_along_axis(values, choice[None], 0).sum())


def expect(model: CostModel, densities: np.ndarray) -> tuple[float, float]:
    """Return the expected error and cost of (parts, layers) densities."""
    choice = np.searchsorted(model.densities, densities - 1e-12)
    return math.sqrt(max(_total(model.error2, choice), 0.0)), _total(model.cost, choice)


def uniform_at_cost(model: CostModel, plan: CalibrationPlan, cost: float) -> SparseMethod:
    """Return ``plan.method`` with the smallest single density whose cost is at least ``cost``.

    That is the baseline of a calibration: it never gets less attention than the calibrated densities.
    """
    fits = [d for d in model.densities if model.expect_uniform(plan.method, float(d), plan.parts)[1] >= cost - 1e-6]
    density = fits[0] if fits else model.densities[-1]
    if model.expect_uniform(plan.method, plan.density, plan.parts)[1] >= cost - 1e-6:
        density = min(density, plan.density)
    changes: dict[str, Any] = {"density": float(density)}
    return dataclasses.replace(plan.method, **changes)
