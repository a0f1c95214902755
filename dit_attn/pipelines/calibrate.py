"""Densities for every layer and part of a run, from a few prompts and a budget of cost or of error.

:mod:`~dit_attn.pipelines.sensitivity` measures, :mod:`~dit_attn.pipelines.allocate` decides, and runs of other prompts
check the outcome against one density for all at the same executed cost.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dit_attn.api import disable
from dit_attn.errors import DitAttnError
from dit_attn.pipelines import allocate, operators
from dit_attn.pipelines.sensitivity import Plan, Play, distance, measure_item, plain
from dit_attn.pipelines.store import Store
from dit_attn.processors.reader import Reader

OURS, THEIRS = "calibrated", "uniform"


@dataclass(frozen=True)
class Calibration:
    """What was found.

    Attributes:
        method: the settings, to ``enable`` or save.
        densities: (parts, layers) of them.
        uniform: the same method with one density, of at least the same cost.
        expected: ``error`` (relative L2 of the final latents) and ``cost`` (executed share of the run's map) of both.
        checked: the same, measured on items that were not calibrated on, with 95 % intervals, and the ``ratio`` of the
            errors; ``None`` without such items.
    """

    method: Reader
    densities: np.ndarray
    uniform: Reader
    expected: dict[str, dict[str, float]]
    checked: dict[str, Any] | None


def calibrate(
    pipe: Any,
    play: Play,
    items: Sequence[str],
    plan: Plan,
    store: Store,
    *,
    check: Sequence[str] = (),
    cost: float | None = None,
    error: float | None = None,
    about: dict[str, Any] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Calibration:
    """Measure what is missing, choose the densities, and check them.

    Args:
        pipe: a stock pipeline; methods on it are taken off.
        play: makes an item of it.
        items: names of those to calibrate on; measurements are kept under them.
        plan: what is measured.
        store: what was measured before, and where to put the rest.
        check: names of further items to compare on.
        cost: largest executed share of the run's map; without a budget that of ``plan.method``.
        error: instead, largest expected relative error of the final latents.
        about: goes into ``method.calibration`` as it is.
        say: is told of every run.

    Raises:
        DitAttnError: both budgets, or one that no densities meet; nothing to make sparse.
    """
    if cost is not None and error is not None:
        raise DitAttnError(f"a budget is a cost or an error, not both; got {cost:g} and {error:g}")
    for item in items:
        measure_item(pipe, play, item, plan, store, say)
    land = allocate.landscape(store, items, plan)
    if cost is None and error is None:
        cost = land.uniform(plan.method, plan.density, plan.parts)[1]
    densities = allocate.allocate(land, cost=cost, error=error)
    ours = allocate.expected(land, densities)
    uniform = allocate.rival(land, plan, ours[1])
    theirs = land.uniform(uniform, float(getattr(uniform, "density")), plan.parts)  # noqa: B009
    expected = {name: {"error": found[0], "cost": found[1]} for name, found in ((OURS, ours), (THEIRS, theirs))}
    checked = None
    if check:
        pair = {OURS: plan.table(densities), THEIRS: uniform}
        for item in check:
            check_item(pipe, play, item, pair, store, say)
        checked = verdict(store, check, OURS, THEIRS)
    record = {
        "transformer": type(pipe.transformer).__name__,
        "layers": int(densities.shape[1]),
        **(about or {}),
        "uniform": uniform.to_dict(),
        "expected": expected,
        "checked": checked,
    }
    changes: dict[str, Any] = {"max_error": plan.method.max_error, "calibration": record}
    method = dataclasses.replace(plan.table(densities), **changes)
    return Calibration(method, densities, uniform, expected, checked)


def check_item(
    pipe: Any, play: Play, item: str, methods: dict[str, Reader], store: Store, say: Callable[[str], None]
) -> None:
    """Run one item dense and with every method; the store gets ``check/ITEM/LABEL``: ``error`` and ``cost``."""
    disable(pipe)
    dense: list[torch.Tensor] = []
    for label, method in methods.items():
        key = f"check/{item}/{json.dumps(method.to_dict() | {'calibration': None}, sort_keys=True)}"
        if key not in store.rows:
            if not dense:
                say(f"{item}: dense")
                dense.append(plain(play, item))
            say(f"{item}: {label}")
            store.put(key, distance(pipe, play, item, method, dense[0]))
        store.rows[f"check/{item}/{label}"] = store.rows[key]


def verdict(store: Store, items: Sequence[str], ours: str, theirs: str) -> dict[str, Any]:
    """Errors and costs of two checked methods with 95 % bootstrap intervals over items, and the ratio of the errors.

    Returns:
        For both ``error`` (geometric mean) and ``cost``; ``ratio`` of the errors, ours over theirs.
    """
    found = {label: [store.rows[f"check/{item}/{label}"] for item in items] for label in (ours, theirs)}
    logs = {
        label: {i: math.log(max(row["error"], operators.FLOOR)) for i, row in enumerate(rows)}
        for label, rows in found.items()
    }
    out: dict[str, Any] = {
        label: {
            "error": operators.over_runs(logs[label]),
            "cost": float(np.mean([row["cost"] for row in rows])),
        }
        for label, rows in found.items()
    }
    return out | {"ratio": operators.over_runs({i: logs[ours][i] - logs[theirs][i] for i in range(len(items))})}
