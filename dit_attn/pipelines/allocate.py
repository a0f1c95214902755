"""From the measurements of a calibration to densities: what every layer and part of a run costs and harms.

The local squared errors at d0, scaled so that layers and parts have the shares that were measured at the end (iterative
proportional fitting: Deming and Stephan 1940), give every cell its share m(l, p) of the final squared error E^2(d0);
at another density it is ``m(l, p) E^2(d0) e^2(l, p, d) / e^2(l, p, d0)``. The densities then go to where a unit of cost
takes away most error, along the lower convex hull of every cell (Everett 1963, generalised Lagrange multipliers).
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
from dit_attn.kernels.selection import blocks_of_density
from dit_attn.pipelines.sensitivity import FLOOR, Plan
from dit_attn.pipelines.store import Store
from dit_attn.processors.method import share
from dit_attn.processors.reader import Reader

OPTIONS = 64  # densities to choose from, at most


@dataclass(frozen=True)
class Landscape:
    """Expected error and cost of every cell at every density that can be chosen.

    Attributes:
        densities: (K,) ascending; the last is 1, dense.
        error2: (K, parts, layers) what the cell adds to the squared relative error of the final latents.
        cost: (K, parts, layers) its share of the executed map of the run; all cells dense sum to 1.
        steps: of a run.
    """

    densities: np.ndarray
    error2: np.ndarray
    cost: np.ndarray
    steps: int

    def uniform(self, method: Reader, density: float, parts: int) -> tuple[float, float]:
        """Expected error and cost of one density, with the dense exceptions of ``method``."""
        index = int(np.searchsorted(self.densities, density - 1e-9))
        share_of = np.ones(self.cost.shape[1:])
        if parts > 1:
            steps = np.arange(self.steps)
            first = share(method.dense_steps, self.steps)
            last = self.steps - share(method.dense_last_steps, self.steps)
            sparse = (steps >= first) & (steps < last)
            part = np.minimum(steps * parts // self.steps, parts - 1)
            share_of *= np.array([sparse[part == p].mean() for p in range(parts)])[:, None]
        for layer in method.dense_layers:
            share_of[:, layer % self.cost.shape[2]] = 0.0
        cost = share_of * self.cost[index] + (1.0 - share_of) * self.cost[-1]
        return math.sqrt(float((share_of * self.error2[index]).sum())), float(cost.sum())


def landscape(store: Store, items: Sequence[str], plan: Plan) -> Landscape:
    """What the measurements of ``items`` say.

    Squared errors are geometric means over items: one that falls apart does not decide alone.
    """
    local = [store.rows[f"local/{item}"] for item in items]
    error2 = _geometric([np.maximum(found["error2"], FLOOR) for found in local])
    cost = np.mean([found["cost"] for found in local], 0)
    weight = np.mean([found["calls"] for found in local], 0)
    rung = plan.ladder.index(plan.density)

    def effect(kind: str, count: int) -> np.ndarray:
        rows = [[store.rows[f"{kind}/{item}/{n}"] for n in range(count)] for item in items]
        return _geometric([np.maximum(np.square(row), FLOOR) for row in rows])

    whole = _geometric([np.maximum(np.square([store.rows[f"all/{item}"]]), FLOOR) for item in items])[0]
    layers = effect("layer", error2.shape[2])
    parts = effect("part", plan.parts) if plan.parts > 1 else np.ones(1)
    cells = fitted(error2[rung] * weight, layers / layers.sum(), parts / parts.sum()) * whole
    scaled = cells * error2 / error2[rung]
    weighted = cost * (weight / weight.sum())
    return _between(plan, scaled, weighted, weight / weight.sum(), local[0])


def fitted(cells: np.ndarray, layers: np.ndarray, parts: np.ndarray, rounds: int = 200) -> np.ndarray:
    """Cells (parts, layers) scaled by row and by column until they have these sums.

    Args:
        cells: positive.
        layers: (layers,) wanted column sums.
        parts: (parts,) wanted row sums, of the same total.
        rounds: of the iteration.
    """
    for _ in range(rounds):
        cells = cells * (parts / cells.sum(1))[:, None]
        cells = cells * (layers / cells.sum(0))
    return cells


def _between(plan: Plan, error2: np.ndarray, cost: np.ndarray, dense: np.ndarray, about: dict[str, Any]) -> Landscape:
    """The rungs, and whole blocks between them: errors along straight lines of logarithms, costs of densities."""
    blocks = math.ceil(about["tokens"] / plan.method.kv_block)
    counts = np.array([blocks_of_density(density, blocks) for density in plan.ladder])
    counts, places = np.unique(counts, return_index=True)
    error2, cost = error2[places], cost[places]
    wanted = np.geomspace(counts[0], counts[-1], OPTIONS)
    chosen = np.unique(np.concatenate([counts, np.round(wanted)]))

    def between(values: np.ndarray, scale: Callable[[np.ndarray], Any]) -> np.ndarray:
        return np.apply_along_axis(lambda column: np.interp(scale(chosen), scale(counts), column), 0, values)

    errors = np.exp(between(np.log(np.maximum(error2, FLOOR)), np.log))
    costs = between(cost, np.asarray)
    kept = chosen < blocks
    return Landscape(
        np.append(chosen[kept] / blocks, 1.0), np.concatenate([errors[kept], np.zeros_like(errors[:1])]),
        np.concatenate([costs[kept], dense[None]]), about["steps"],
    )  # fmt: skip


def _geometric(values: Sequence[Any]) -> np.ndarray:
    return np.exp(np.mean(np.log(np.asarray(values)), 0))


def allocate(land: Landscape, *, cost: float | None = None, error: float | None = None) -> np.ndarray:
    """Densities (parts, layers) with the least expected error for a cost, or the least cost for an error.

    Args:
        land: what they are chosen from.
        cost: largest executed share of the run's map.
        error: largest relative error of the final latents.

    Raises:
        DitAttnError: a cost under that of the lowest density.
    """
    shape = land.cost.shape[1:]
    floor = land.cost.min(0).sum()
    if cost is not None and cost < floor - 1e-9:
        raise DitAttnError(
            f"--cost {cost:g} is below {floor:.3f}, what the lowest measured density ({land.densities[0]:g}) costs in "
            "every layer and step; give more, or lower --densities"
        )
    choice = np.zeros(shape, dtype=int)
    steps = []
    for where in np.ndindex(shape):
        hull = _hull(land.cost[(slice(None), *where)], land.error2[(slice(None), *where)])
        choice[where] = hull[0]
        for before, after in itertools.pairwise(hull):
            paid = land.cost[(after, *where)] - land.cost[(before, *where)]
            gain = land.error2[(before, *where)] - land.error2[(after, *where)]
            steps.append((gain / paid, paid, where, before, after))
    spent, left = float(floor), _total(land.error2, choice)
    for gain, paid, where, before, after in sorted(steps, key=lambda step: -step[0]):
        if error is not None and math.sqrt(max(left, 0.0)) <= error:
            break
        if choice[where] != before or (cost is not None and spent + paid > cost + 1e-9):
            continue
        choice[where] = after
        spent, left = spent + paid, left - gain * paid
    return land.densities[choice]


def _hull(cost: np.ndarray, error2: np.ndarray) -> list[int]:
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


def expected(land: Landscape, densities: np.ndarray) -> tuple[float, float]:
    """Error and cost of densities (parts, layers)."""
    choice = np.searchsorted(land.densities, densities - 1e-12)
    return math.sqrt(max(_total(land.error2, choice), 0.0)), _total(land.cost, choice)


def rival(land: Landscape, plan: Plan, cost: float) -> Reader:
    """``plan.method`` with the smallest density that costs no less than ``cost``; its own where that is just enough."""
    fits = [d for d in land.densities if land.uniform(plan.method, float(d), plan.parts)[1] >= cost - 1e-6]
    density = fits[0] if fits else land.densities[-1]
    if land.uniform(plan.method, plan.density, plan.parts)[1] >= cost - 1e-6:
        density = min(density, plan.density)
    changes: dict[str, Any] = {"density": float(density)}
    return dataclasses.replace(plan.method, **changes)
