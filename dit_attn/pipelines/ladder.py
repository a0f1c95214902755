"""The ladder of readers that a measurement climbs, and the comparison of its rungs at equal executed cost.

A family is one way to read and to compensate; its rungs are densities. Virtual keys are computed too, so a family with
them costs more at the same density: errors are compared where the whole cost is equal, on curves through the rungs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from dit_attn.errors import DitAttnError
from dit_attn.pipelines import operators
from dit_attn.pipelines.operators import Probe
from dit_attn.processors.block_sparse import BlockSparse
from dit_attn.processors.method import Method
from dit_attn.processors.re_ttention import RAMPS, ReTtention
from dit_attn.processors.rectified_spaattn import RectifiedSpaAttn

DENSITIES = (0.5, 0.25, 0.125, 0.0625, 0.03)
COSTS = (0.1, 0.15, 0.2, 0.25)
UNIT = "run: one prompt or seed with all its layers, steps and branches; resampled with replacement, 2000 times"
DEFAULT = "default"


@dataclass(frozen=True)
class Family:
    """One way to read and to compensate.

    Attributes:
        name: what tables call it.
        make: method for (density, tokens per block).
        remembers: whether it needs every step.
    """

    name: str
    make: Callable[[float, int], Method]
    remembers: bool = False


def families(block: int) -> list[Family]:
    """Every family of the ladder for blocks of so many tokens: readers without and with compensations."""
    found = [
        Family("block-sparse", lambda density, size: BlockSparse(density=density, **_same(size))),
        Family(DEFAULT, lambda density, size: RectifiedSpaAttn(density=density, **_same(size))),
    ]
    for order in ("hilbert", "auto", "none"):
        found.append(_rectified(f"none {order}", compensation="none", select="mass", order=order))
    for order in ("hilbert", "auto"):
        for compensation in ("paper", "repo"):
            found.append(_rectified(f"{compensation} {order}", compensation=compensation, select="mass", order=order))
    whole, half, quarter = virtual_sizes(block)
    for order in ("hilbert", "auto", "none"):
        found.append(_rectified(f"merge {whole} {order}", virtual_block=whole, order=order))
    for size in (half, quarter):
        found.append(_rectified(f"merge {size} auto", virtual_block=size))
    found += [
        _rectified(f"merge {whole} auto by mass", virtual_block=whole, select="mass"),
        _rectified(f"merge {whole} auto variance", virtual_block=whole, variance=True),
        _rectified(f"merge {half} auto variance", virtual_block=half, variance=True),
        _rectified(f"merge {whole} auto probe {half}", virtual_block=whole, probe=half),
        _rectified(f"merge {whole} auto probe {quarter}", virtual_block=whole, probe=quarter),
        _rectified("merge in blocks of half", 0.5, virtual_block=half),
        _rectified("none in blocks of half", 0.5, compensation="none", select="mass"),
    ]
    for mask in ("band", "window", "selected"):
        found += [_reuse(f"re-ttention {mask}", mask=mask)]
    found += [_reuse(f"re-ttention window {ramp}", mask="window", ramp=ramp) for ramp in RAMPS if ramp != "none"]
    return found


def chosen(names: Sequence[str], block: int) -> list[Family]:
    """The families of these names, all for none.

    Raises:
        DitAttnError: a name that no family has.
    """
    known = {family.name: family for family in families(block)}
    for name in names:
        if name not in known:
            raise DitAttnError(f"no family {name!r} for blocks of {block}; choose of: {', '.join(known)}")
    return [known[name] for name in names] if names else list(known.values())


def virtual_sizes(block: int) -> list[int]:
    """Tokens per virtual key that are measured: the block, its half and its quarter, as near as divisors come."""
    divisors = [size for size in range(1, block + 1) if block % size == 0]

    def nearest(wanted: float) -> int:
        return min(divisors, key=lambda size: (abs(size - wanted), -size))

    return [nearest(block / part) for part in (1, 2, 4)]


def probes(found: Sequence[Family], densities: Sequence[float], block: int, every: int) -> dict[str, list[Probe]]:
    """One probe a rung, by family.

    Args:
        found: families.
        densities: rungs.
        block: tokens per block.
        every: steps between two measured ones, for families that remember nothing.
    """
    return {
        family.name: [
            Probe(f"{family.name} {density:g}", family.make(density, block), 1 if family.remembers else every)
            for density in densities
            if density < 0.5 or not family.remembers  # with its refreshes it would cost more than half of dense
        ]
        for family in found
    }


def _same(block: int) -> dict[str, Any]:
    return {"q_block": block, "kv_block": block, "dense_steps": 0}


def _rectified(name: str, part: float = 1.0, **options: Any) -> Family:
    def make(density: float, size: int) -> Method:
        return RectifiedSpaAttn(density=density, **_same(max(8, int(size * part))), **options)

    return Family(name, make)


def _reuse(name: str, **options: Any) -> Family:
    def make(density: float, size: int) -> Method:
        return ReTtention(density=density, **_same(size), stagger=False, **options)

    return Family(name, make, remembers=True)


# -- equal cost --------------------------------------------------------------------------------------------------------


def curve(rungs: Sequence[Probe], key: str) -> dict[int, list[tuple[float, float]]]:
    """By run: (logarithm of the cost, logarithm of the error) of every rung, cheapest first."""
    found: dict[int, list[tuple[float, float]]] = {}
    for probe in rungs:
        errors = operators.log_errors(probe.calls, key)
        for run, error in errors.items():
            costs = [call["cost"] for call in probe.calls if call["run"] == run]
            found.setdefault(run, []).append((math.log(sum(costs) / len(costs)), error))
    return {run: sorted(points) for run, points in found.items()}


def error_at(points: Sequence[tuple[float, float]], cost: float) -> float | None:
    """Logarithm of the error at a cost, on straight lines between the rungs; ``None`` outside them."""
    place = math.log(cost)
    for (low, at_low), (high, at_high) in pairwise(points):
        if low <= place <= high:
            share = 0.0 if high == low else (place - low) / (high - low)
            return at_low + share * (at_high - at_low)
    return None


def ratio(ours: Sequence[Probe], theirs: Sequence[Probe], cost: float, key: str) -> dict[str, Any] | None:
    """Error of ``ours`` over that of ``theirs`` at one executed cost: geometric mean and 95 % interval over runs.

    Args:
        ours, theirs: rungs of two families on the same runs.
        cost: share of the dense map, virtual keys counted.
        key: ``l2``, ``shift`` or ``rms``.

    Returns:
        ``None`` where a curve does not reach that cost.
    """
    a, b = curve(ours, key), curve(theirs, key)
    found = {}
    for run in a.keys() & b.keys():
        over, under = error_at(a[run], cost), error_at(b[run], cost)
        if over is None or under is None:
            return None
        found[run] = over - under
    return operators.over_runs(dict(sorted(found.items())))


def at_cost(measured: dict[str, list[Probe]], cost: float, key: str) -> dict[str, dict[str, Any]]:
    """By family: its error at one executed cost with the interval over runs, smallest first."""
    found = {}
    for name, rungs in measured.items():
        logs = {run: error_at(points, cost) for run, points in curve(rungs, key).items()}
        reached = {run: value for run, value in logs.items() if value is not None}
        figure = operators.over_runs(reached) if len(reached) == len(logs) else None
        if figure is not None:
            found[name] = figure
    return dict(sorted(found.items(), key=lambda item: item[1]["value"]))


TARGETS = (  # error, baseline, largest ratio
    ("l2", "none hilbert", 0.35),
    ("l2", "paper hilbert", 0.6),
    ("shift", "none hilbert", 0.4),
)


def targets(measured: dict[str, list[Probe]], ours: str = DEFAULT) -> list[dict[str, Any]]:
    """Whether a family reaches the targets at every cost of :data:`COSTS`.

    Returns:
        One entry a target whose families were measured: ``error``, ``against``, ``limit``, ``at`` (by cost the ratio,
        ``None`` where a curve does not reach), ``worst`` (largest ratio) and ``met``.
    """
    found = []
    for key, against, limit in TARGETS:
        if ours not in measured or against not in measured:
            continue
        at = {f"{cost:g}": ratio(measured[ours], measured[against], cost, key) for cost in COSTS}
        values = [figure["value"] for figure in at.values() if figure is not None]
        worst = max(values) if values else None
        met = worst is not None and worst <= limit
        found.append({"error": key, "against": against, "limit": limit, "at": at, "worst": worst, "met": met})
    return found


def summary(measured: dict[str, list[Probe]]) -> dict[str, Any]:
    """Everything that is reported of a ladder.

    Returns:
        ``rows`` (one a rung, with its ``family``), ``equal_cost`` (by error and cost the families, best first),
        ``targets``, and ``best``: by cost the readers without memory of smallest ``l2``, and the default over it.
    """
    rows = [{"family": name, **operators.row(probe)} for name, rungs in measured.items() for probe in rungs]
    costs = {
        key: {f"{cost:g}": at_cost(measured, cost, key) for cost in COSTS} for key in ("l2", "shift", "rms")
    }
    best = {}
    for cost in COSTS:
        names = [name for name in costs["l2"][f"{cost:g}"] if not name.startswith("re-ttention")]
        if names and DEFAULT in measured:
            best[f"{cost:g}"] = {"family": names[0], "default_over_it": ratio(
                measured[DEFAULT], measured[names[0]], cost, "l2"
            )}  # fmt: skip
    return {"rows": rows, "equal_cost": costs, "targets": targets(measured), "best": best}
