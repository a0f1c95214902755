"""What sparse attention does to the result, layer by layer and part by part: the measurements of a calibration.

Runs are compared with their dense twin of the same prompt and noise:

* one dense run shows every attention call at a ladder of densities: error e(l, p, d) of the output of layer l in part p
  of the run, and the executed share c(l, p, d) of its map;
* one run with each layer alone sparse, one with each part alone sparse, and one with all of it sparse, at one density
  d0, say what reaches the final latents.

What follows from them is in :mod:`dit_attn.pipelines.allocate`.
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

from dit_attn.api import disable, enabled, observing
from dit_attn.errors import DitAttnError
from dit_attn.pipelines import operators
from dit_attn.pipelines.store import Store
from dit_attn.processors import executor
from dit_attn.processors.attach import session_of
from dit_attn.processors.executor import AttentionCall, Request
from dit_attn.processors.reader import Reader, part_of_run
from dit_attn.processors.summary import summarize

LADDER = (0.75, 0.5, 0.35, 0.25, 0.18, 0.125, 0.0625)
PARTS = 10
FLOOR = 1e-14  # a squared error of zero has no logarithm
RUINED = 10.0  # error of a result that is NaN, infinite or further off than that

Play = Callable[[str], torch.Tensor]
"""``play(item)`` makes the item of that name with what is enabled on the pipeline and returns its final latents."""


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        method: settings to start from; its density is d0.
        parts: equal parts of the run whose densities may differ.
        ladder: densities of the local measurement, d0 among them, descending.
        every: look at one step of so many in the local measurement.
    """

    method: Reader
    parts: int
    ladder: tuple[float, ...]
    every: int = 1

    @property
    def density(self) -> float:
        """d0."""
        return float(cast(Any, self.method).density)

    @property
    def free(self) -> Reader:
        """The method without the dense exceptions that the table takes over."""
        changes: dict[str, Any] = {"dense_layers": (), "max_error": None}
        changes |= {"dense_steps": 0, "dense_last_steps": 0} if self.parts > 1 else {}
        return dataclasses.replace(self.method, **changes)

    def at(self, density: float) -> Reader:
        """:attr:`free` with one density."""
        changes: dict[str, Any] = {"density": density}
        return dataclasses.replace(self.free, **changes)

    def table(self, densities: np.ndarray) -> Reader:
        """The method with densities (parts, layers)."""
        flat = tuple(float(value) for value in densities.reshape(-1))
        return dataclasses.replace(self.free, densities=flat, parts=self.parts)


def new_plan(
    method: Any, parts: int | None = None, ladder: Sequence[float] | None = None, every: int | None = None,
    steps: int | None = None,
) -> Plan:  # fmt: skip
    """A plan, checked.

    Args:
        method: a reader with a density.
        parts: ``None`` for :data:`PARTS`, or 1 where the method keeps its own schedule.
        ladder: densities; ``None`` for :data:`LADDER`.
        every: ``None`` for one step of every part, or every step where the method remembers.
        steps: of a run, where it is known.

    Raises:
        DitAttnError: no such method, or a number out of range.
    """
    if not isinstance(method, Reader) or getattr(method, "density", None) is None:
        raise DitAttnError(
            f"{getattr(method, 'slug', method)} has no density to calibrate; give one method that decides which keys "
            "are read, with a density (and no top_p)"
        )
    if method.densities is not None or getattr(method, "top_p", None) is not None:
        name = "densities" if method.densities is not None else "top_p"
        raise DitAttnError(f"{method.slug}.{name} is set, which calibration would replace; give density alone")
    density = float(cast(Any, method).density)
    rungs = sorted({*(ladder or LADDER), density}, reverse=True)
    for value in rungs:
        if not 0.0 < value < 1.0:
            raise DitAttnError(f"densities to measure must be above 0 and below 1, got {value!r}")
    if len(rungs) < 2:
        raise DitAttnError(f"one density to measure is not enough, got {rungs[0]}; give at least two")
    if parts is not None and parts > 1 and not method.by_step:
        raise DitAttnError(f"{method.slug} keeps its own schedule over the steps, so parts must be 1, got {parts}")
    parts = parts or (min(PARTS, steps or PARTS) if method.by_step else 1)
    if steps is not None and parts > steps:
        raise DitAttnError(f"a run of {steps} steps has no {parts} parts; give at most {steps}")
    if every is None:
        every = max(1, (steps or parts) // parts) if method.by_step and parts > 1 else 1
    return Plan(method, parts, tuple(rungs), every)


# -- measuring ---------------------------------------------------------------------------------------------------------


class Census:
    """An observer that counts the calls that can be touched: ``calls[layer, part]``, and the part of every step."""

    def __init__(self, parts: int, every: int) -> None:
        self.parts, self.every = parts, every
        self.calls: Counter[tuple[int, int]] = Counter()
        self.looked: Counter[tuple[int, int]] = Counter()
        self.part: dict[int, int] = {}
        self.layers = self.tokens = self.steps = 0

    def __call__(self, call: AttentionCall, request: Request, exact: torch.Tensor) -> None:
        """Count ``call``."""
        if executor.unfit(call):
            return
        step = call.clock.step
        part = self.part[step] = part_of_run(call.clock, self.parts)
        self.calls[part, call.site.index] += 1
        self.looked[part, call.site.index] += step % self.every == self.every // 2
        self.layers = call.site.session.layer_count
        self.steps = max(self.steps, call.clock.total or step + 1)
        self.tokens = call.q.shape[1]


def runs_of(item: str, plan: Plan, layers: int) -> dict[str, Any]:
    """The runs of one item with something sparse: key in the store, and where (parts, layers) they are sparse."""
    runs: dict[str, Any] = {f"all/{item}": np.s_[:, :]}
    runs |= {f"layer/{item}/{layer}": np.s_[:, layer] for layer in range(layers)}
    return runs | ({f"part/{item}/{part}": np.s_[part, :] for part in range(plan.parts)} if plan.parts > 1 else {})


def measure_item(pipe: Any, play: Play, item: str, plan: Plan, store: Store, say: Callable[[str], None]) -> None:
    """All measurements of one item that the store does not have.

    Args:
        pipe: the pipeline; methods on it are taken off.
        play: makes an item.
        item: which.
        plan: what is measured.
        store: gets ``local/ITEM``, ``layer/ITEM/L``, ``part/ITEM/P`` and ``all/ITEM``.
        say: is told of every run.
    """
    disable(pipe)
    dense: list[torch.Tensor] = []

    if f"local/{item}" not in store.rows:
        say(f"{item}: every density, call by call")
        found, latents = _local(pipe, play, item, plan)
        store.put(f"local/{item}", found)
        dense.append(latents)
    shape = (plan.parts, len(store.rows[f"local/{item}"]["calls"][0]))
    for key, where in runs_of(item, plan, shape[1]).items():
        if key in store.rows:
            continue
        if not dense:
            say(f"{item}: dense")
            dense.append(plain(play, item))
        say(" ".join([f"{item}:", *key.split("/")[::2], "sparse"]))
        densities = np.ones(shape)
        densities[where] = plan.density
        store.put(key, distance(pipe, play, item, plan.table(densities), dense[0])["error"])


def _local(pipe: Any, play: Play, item: str, plan: Plan) -> tuple[dict[str, Any], torch.Tensor]:
    """Squared error and cost of every rung, part and layer; and the dense latents."""
    census = Census(plan.parts, plan.every)
    probes = [operators.Probe(str(density), plan.at(density), plan.every) for density in plan.ladder]

    def observe(call: AttentionCall, request: Request, exact: torch.Tensor) -> None:
        census(call, request, exact)
        for probe in probes:
            probe(call, request, exact)

    with observing(pipe, observe), torch.no_grad():
        latents = play(item)
    if not census.calls:
        raise DitAttnError(
            "no attention call of this run can be made sparse (`dit-attn explain` says why); give a larger size"
        )
    shape = (plan.parts, census.layers)
    calls, looked = (_grid(counts, shape) for counts in (census.calls, census.looked))
    if not looked.all():
        raise DitAttnError(
            f"looking at one step of {plan.every} leaves parts of a run of {census.steps} steps without a measurement; "
            "give a smaller --every or fewer --parts"
        )
    errors, costs = [], []
    for probe in probes:
        error, extra = np.zeros(shape), np.zeros(shape)
        for found in probe.calls:
            where = census.part[found["step"]], found["layer"]
            error[where] += found["l2"] ** 2
            extra[where] += found["cost"] - 1.0
        errors.append((error / looked).tolist())
        costs.append((1.0 + extra / looked).tolist())
    _finite(latents, item)
    about = {"error2": errors, "cost": costs, "calls": calls.tolist(), "steps": census.steps, "tokens": census.tokens}
    return about, latents


def _grid(counts: Counter[tuple[int, int]], shape: tuple[int, int]) -> np.ndarray:
    out = np.zeros(shape)
    for where, count in counts.items():
        out[where] = count
    return out


def plain(play: Play, item: str) -> torch.Tensor:
    """The final latents of an item, with nothing enabled.

    Raises:
        DitAttnError: they are not finite.
    """
    with torch.no_grad():
        return _finite(play(item), item)


def _finite(latents: torch.Tensor, item: str) -> torch.Tensor:
    if not torch.isfinite(latents).all():
        raise DitAttnError(f"the dense run of {item} is NaN or infinite, so nothing compares with it; try --dtype fp32")
    return latents


def distance(pipe: Any, play: Play, item: str, method: Reader, dense: torch.Tensor) -> dict[str, float]:
    """Relative L2 ``error`` of the final latents against dense ones, and the executed ``cost`` of the run.

    The cost is the executed share of the run's attention map, dense calls and the ranking of pieces counted.
    """
    with enabled(pipe, method), torch.no_grad():
        latents = play(item)
        models = {name: getattr(pipe, name, None) for name in ("transformer", "transformer_2")}
        sessions = {name: found for name, model in models.items() if model is not None and (found := session_of(model))}
        report = summarize(sessions)
    gap = float((latents.double() - dense.double()).norm() / dense.double().norm().clamp(min=1e-30))
    cost = report.run_density
    ranking = operators.ranking_share(method) * report.engaged / max(report.calls, 1)
    return {
        "error": min(gap, RUINED) if math.isfinite(gap) else RUINED,
        "cost": 1.0 if cost is None else float(cost) + ranking,
    }
