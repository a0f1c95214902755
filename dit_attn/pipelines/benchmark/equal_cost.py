"""Compare sparse methods at equal cost, on error curves over several densities.

A method family is one way to select key blocks and to compensate for the skipped ones; it is measured at several
densities. Pooled keys are computed too, so a family that uses them costs more at the same density. Errors are therefore
compared where the total cost is equal, on straight lines (of logarithms) between the measured densities.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from dit_attn.errors import DitAttnError
from dit_attn.pipelines.benchmark import operator_error
from dit_attn.pipelines.benchmark.operator_error import OperatorProbe
from dit_attn.pipelines.benchmark.oracle import OracleSpaAttn
from dit_attn.processors.methods.base import Method
from dit_attn.processors.methods.block_sparse import BlockSparse
from dit_attn.processors.methods.re_ttention import RAMPS, ReTtention
from dit_attn.processors.methods.rectified_spaattn import RectifiedSpaAttn
from dit_attn.processors.methods.selecting import MEASURED, SELECTORS

DENSITIES = (0.5, 0.25, 0.125, 0.0625, 0.03)
COSTS = (0.05, 0.1, 0.15, 0.2, 0.25)
UNIT = "run: one prompt or seed with all its layers, steps and branches; resampled with replacement, 2000 times"
DEFAULT = "default"


@dataclass(frozen=True)
class MethodFamily:
    """One way to select key blocks and to compensate, at any density.

    Attributes:
        name: for tables.
        make: makes the method for (density, tokens per block).
        stateful: whether the method has state from step to step and must see every step.
    """

    name: str
    make: Callable[[float, int], Method]
    stateful: bool = False


def method_families(block: int) -> list[MethodFamily]:
    """Return every method family, without and with compensation, for blocks of ``block`` tokens."""
    found = [
        MethodFamily("block-sparse", lambda density, size: BlockSparse(density=density, **_same(size))),
        MethodFamily(DEFAULT, lambda density, size: RectifiedSpaAttn(density=density, **_same(size))),
    ]
    for order in ("hilbert", "auto", "none"):
        found.append(_rectified(f"none {order}", compensation="none", selector="mass", order=order))
    for order in ("hilbert", "auto"):
        for compensation in ("paper", "repo"):
            found.append(_rectified(f"{compensation} {order}", compensation=compensation, selector="mass", order=order))
    full, half, quarter = pooled_key_sizes(block)
    for order in ("hilbert", "auto", "none"):
        found.append(_rectified(f"merge {full} {order}", pooled_block=full, order=order))
    for size in (half, quarter):
        found.append(_rectified(f"merge {size} auto", pooled_block=size))
    found += [
        _rectified(f"merge {full} auto by mass", pooled_block=full, selector="mass"),
        _rectified(f"merge {full} auto variance", pooled_block=full, variance=True),
        _rectified(f"merge {half} auto variance", pooled_block=half, variance=True),
        _rectified(f"merge {full} auto probe {half}", pooled_block=full, probe=half),
        _rectified(f"merge {full} auto probe {quarter}", pooled_block=full, probe=quarter),
        _rectified("merge in blocks of half", 0.5, pooled_block=half),
        _rectified("none in blocks of half", 0.5, compensation="none", selector="mass"),
    ]
    found += selector_families(block)
    for mask in ("band", "window", "selected"):
        found += [_reuse(f"re-ttention {mask}", mask=mask)]
    found += [_reuse(f"re-ttention window {ramp}", mask="window", ramp=ramp) for ramp in RAMPS if ramp != "none"]
    return found


def selector_families(block: int) -> list[MethodFamily]:
    """Return a family for every selector, for the budgets and compensations beside them, and for published methods."""
    full, _, quarter = pooled_key_sizes(block)
    found = [_rectified(f"by {name}", selector=name) for name in SELECTORS if name != MEASURED]
    found += [_measured(f"by measured {what}", measure=what) for what in ("mass", "error")]
    found += [
        _rectified("by ear-centered, 4 probes", selector="ear-centered", probe=max(1, quarter)),
        *(_rectified(f"by {name}, a head", selector=name, spread="head") for name in ("error", "ear-centered")),
        *(_measured(f"by measured error, a {spread}", spread=spread) for spread in ("head", "layer")),
        _rectified(f"merge {full} auto first order", pooled_block=full, first_order=True),
        _rectified(f"merge {full} auto two levels", pooled_block=full, fine=0.1, fine_block=quarter),
        _rectified("sol-attn", selector="sol", spread="layer", pooled_block=full),
        _rectified("pisa", selector="mass", pooled_block=full, first_order=True),
        _rectified("svg-ear", selector="ear", pooled_block=full),
        _rectified("dfsattn", selector="dfs", compensation="none", order="hilbert"),
        _measured("combined", spread="head", pooled_block=full, fine=0.1, fine_block=quarter),
        _oracle("oracle mass", measure="mass"),
        *(_oracle(f"oracle error, a {spread}", spread=spread) for spread in ("row", "head")),
    ]
    return found


def select_families(names: Sequence[str], block: int) -> list[MethodFamily]:
    """Return the method families of the given names; all of them without names.

    Args:
        names: see :func:`method_families`.
        block: tokens per block.

    Raises:
        DitAttnError: unknown name.
    """
    known = {family.name: family for family in method_families(block)}
    for name in names:
        if name not in known:
            raise DitAttnError(f"no family {name!r} for blocks of {block}; choose of: {', '.join(known)}")
    return [known[name] for name in names] if names else list(known.values())


def pooled_key_sizes(block: int) -> list[int]:
    """Return the measured tokens per pooled key: the divisors nearest to a block, its half and its quarter."""
    divisors = [size for size in range(1, block + 1) if block % size == 0]

    def nearest(wanted: float) -> int:
        return min(divisors, key=lambda size: (abs(size - wanted), -size))

    return [nearest(block / part) for part in (1, 2, 4)]


def make_probes(
    chosen: Sequence[MethodFamily], densities: Sequence[float], block: int, step_stride: int
) -> dict[str, list[OperatorProbe]]:
    """Make one probe per density, by family name.

    Args:
        chosen: method families.
        densities: to measure.
        block: tokens per block.
        step_stride: measure one of so many steps; stateful families are measured at every step.
    """
    return {
        family.name: [
            OperatorProbe(
                f"{family.name} {density:g}", family.make(density, block), 1 if family.stateful else step_stride
            )
            for density in densities
            if density < 0.5 or not family.stateful  # with its refreshes it would cost more than half of dense
        ]
        for family in chosen
    }


def _same(block: int) -> dict[str, Any]:
    return {"q_block": block, "kv_block": block, "dense_steps": 0}


def _rectified(name: str, fraction: float = 1.0, **options: Any) -> MethodFamily:
    def make(density: float, size: int) -> Method:
        return RectifiedSpaAttn(density=density, **_same(max(8, int(size * fraction))), **options)

    return MethodFamily(name, make)


def _reuse(name: str, **options: Any) -> MethodFamily:
    def make(density: float, size: int) -> Method:
        return ReTtention(density=density, **_same(size), stagger=False, **options)

    return MethodFamily(name, make, stateful=True)


def _measured(name: str, **options: Any) -> MethodFamily:
    def make(density: float, size: int) -> Method:
        return RectifiedSpaAttn(density=density, **_same(size), selector=MEASURED, stagger=False, **options)

    return MethodFamily(name, make, stateful=True)


def _oracle(name: str, **options: Any) -> MethodFamily:
    def make(density: float, size: int) -> Method:
        return OracleSpaAttn(density=density, **_same(size), **options)

    return MethodFamily(name, make)


# -- equal cost --------------------------------------------------------------------------------------------------------


def error_curve(probes: Sequence[OperatorProbe], key: str) -> dict[int, list[tuple[float, float]]]:
    """Return the error curve of every run: (log cost, log error) of every probe, cheapest first."""
    found: dict[int, list[tuple[float, float]]] = {}
    for probe in probes:
        errors = operator_error.log_errors(probe.calls, key)
        for run, error in errors.items():
            costs = [call["cost"] for call in probe.calls if call["run"] == run]
            found.setdefault(run, []).append((math.log(sum(costs) / len(costs)), error))
    return {run: sorted(points) for run, points in found.items()}


def error_at(points: Sequence[tuple[float, float]], cost: float) -> float | None:
    """Interpolate the log error of a curve at a cost; ``None`` outside the measured costs."""
    place = math.log(cost)
    for (low, at_low), (high, at_high) in pairwise(points):
        if low <= place <= high:
            fraction = 0.0 if high == low else (place - low) / (high - low)
            return at_low + fraction * (at_high - at_low)
    return None


def error_ratio(
    ours: Sequence[OperatorProbe], theirs: Sequence[OperatorProbe], cost: float, key: str
) -> dict[str, Any] | None:
    """Divide the error of ``ours`` by that of ``theirs`` at equal cost.

    Args:
        ours, theirs: probes of two families on the same runs.
        cost: attention computed, as a fraction of dense; pooled keys are counted.
        key: of :data:`~dit_attn.pipelines.benchmark.operator_error.ERRORS`.

    Returns:
        ``value`` (geometric mean over runs), ``ci95`` and ``n``; ``None`` where a curve does not reach that cost.
    """
    a, b = error_curve(ours, key), error_curve(theirs, key)
    found = {}
    for run in a.keys() & b.keys():
        over, under = error_at(a[run], cost), error_at(b[run], cost)
        if over is None or under is None:
            return None
        found[run] = over - under
    return operator_error.mean_over_runs(dict(sorted(found.items())))


def errors_at_cost(measured: dict[str, list[OperatorProbe]], cost: float, key: str) -> dict[str, dict[str, Any]]:
    """Return the error of every family at one cost, with its interval over runs, smallest first."""
    found = {}
    for name, probes in measured.items():
        logs = {run: error_at(points, cost) for run, points in error_curve(probes, key).items()}
        reached = {run: value for run, value in logs.items() if value is not None}
        figure = operator_error.mean_over_runs(reached) if len(reached) == len(logs) else None
        if figure is not None:
            found[name] = figure
    return dict(sorted(found.items(), key=lambda item: item[1]["value"]))


def _serves_alone(probes: Sequence[OperatorProbe]) -> bool:
    """Whether a family needs nothing but the call: no state of earlier steps, and no dense result."""
    return not any(
        probe.method.cache_bytes(4096, 1, 64, 4) or isinstance(probe.method, OracleSpaAttn) for probe in probes
    )


TARGETS = (  # error, baseline, largest ratio
    ("l2", "none hilbert", 0.35),
    ("l2", "paper hilbert", 0.6),
    ("shift", "none hilbert", 0.4),
)


def check_targets(measured: dict[str, list[OperatorProbe]], ours: str = DEFAULT) -> list[dict[str, Any]]:
    """Check whether a family reaches :data:`TARGETS` at every cost of :data:`COSTS`.

    Returns:
        One entry per target whose families were measured: ``error``, ``against``, ``limit``, ``at`` (ratio by cost,
        ``None`` where a curve does not reach it), ``worst`` (largest ratio) and ``met``.
    """
    found = []
    for key, against, limit in TARGETS:
        if ours not in measured or against not in measured:
            continue
        at = {f"{cost:g}": error_ratio(measured[ours], measured[against], cost, key) for cost in COSTS}
        values = [figure["value"] for figure in at.values() if figure is not None]
        worst = max(values) if values else None
        met = worst is not None and worst <= limit
        found.append({"error": key, "against": against, "limit": limit, "at": at, "worst": worst, "met": met})
    return found


def summarize_families(measured: dict[str, list[OperatorProbe]]) -> dict[str, Any]:
    """Summarize the measurements of all families.

    Returns:
        ``rows`` (one per probe, with its ``family``), ``equal_cost`` (the families by error and cost, best first),
        ``targets`` (see :func:`check_targets`), and ``best``: by cost the stateless ``family`` of smallest ``l2``, and
        ``default_over_it``, the error ratio of the default family to it.
    """
    pairs = [(name, probe) for name, probes in measured.items() for probe in probes]
    rows = [{"family": name, **operator_error.probe_row(probe)} for name, probe in pairs]
    costs = {key: {f"{cost:g}": errors_at_cost(measured, cost, key) for cost in COSTS} for key in operator_error.ERRORS}
    best = {}
    for cost in COSTS:
        names = [name for name in costs["l2"][f"{cost:g}"] if _serves_alone(measured[name])]
        if names and DEFAULT in measured:
            best[f"{cost:g}"] = {"family": names[0], "default_over_it": error_ratio(
                measured[DEFAULT], measured[names[0]], cost, "l2"
            )}  # fmt: skip
    return {"rows": rows, "equal_cost": costs, "targets": check_targets(measured), "best": best}
