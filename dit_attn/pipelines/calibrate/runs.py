"""The runs of a calibration: what is requested of each, who makes them, and what the log lacks of an item.

A request names an item and a method, and its answer is a few numbers, so that workers can make the runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch

from dit_attn.api import disable, enabled
from dit_attn.pipelines.calibrate.sensitivity import (
    CalibrationPlan,
    RunItem,
    dense_latents,
    measure_locally,
    run_sparse,
)
from dit_attn.pipelines.measurement_log import MeasurementLog
from dit_attn.pipelines.run import Answers
from dit_attn.processors.methods.base import Method
from dit_attn.processors.methods.sparse import SparseMethod


@dataclass(frozen=True)
class RunRequest:
    """One run of an item.

    Attributes:
        item: its name.
        label: of the run, for people.
        method: enabled for the run, as JSON values; ``None``: a dense run that every density is measured on.
    """

    item: str
    label: str
    method: dict[str, Any] | None = None


class RequestedRuns:
    """Runs a pipeline as requested; the dense run of an item is made once for requests that follow each other.

    Args:
        pipe: a stock pipeline; enabled methods are disabled.
        run_item: runs ``pipe`` for an item and returns its final latents.
        plan: what is measured.
        on_progress: called with a line of text before every run.
    """

    def __init__(
        self,
        pipe: Any,
        run_item: RunItem,
        plan: CalibrationPlan,
        on_progress: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.pipe, self.run_item, self.plan, self.on_progress = pipe, run_item, plan, on_progress
        self._dense: tuple[str, torch.Tensor] | None = None
        disable(pipe)

    def __call__(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return what a run has measured: errors and costs of every density, or ``error`` and ``cost`` of the method.

        Args:
            request: a :class:`RunRequest`, as JSON values.

        Raises:
            DitAttnError: the dense run is not finite, or has no attention call that can be made sparse.
        """
        given = RunRequest(**request)
        if given.method is None:
            self.on_progress(f"{given.item}: {given.label}")
            measured, latents = measure_locally(self.pipe, self.run_item, given.item, self.plan)
            self._dense = given.item, latents
            return measured
        if self._dense is None or self._dense[0] != given.item:
            self.on_progress(f"{given.item}: dense")
            self._dense = given.item, dense_latents(self.run_item, given.item)
        self.on_progress(f"{given.item}: {given.label}")
        method = cast(SparseMethod, Method.from_dict(given.method))
        return run_sparse(self.pipe, self.run_item, given.item, method, self._dense[1])


def sparse_runs(item: str, plan: CalibrationPlan, layers: int) -> dict[str, Any]:
    """Return the sparse runs of one item: key in the log, and the index into (parts, layers) that is sparse."""
    runs: dict[str, Any] = {f"all/{item}": np.s_[:, :]}
    runs |= {f"layer/{item}/{layer}": np.s_[:, layer] for layer in range(layers)}
    return runs | ({f"part/{item}/{part}": np.s_[part, :] for part in range(plan.parts)} if plan.parts > 1 else {})


def layer_count(pipe: Any) -> int:
    """Return the number of attention layers that densities are chosen for."""
    with enabled(pipe) as session:
        return int(session.layer_count)


def measure_items(
    items: Sequence[str], plan: CalibrationPlan, layers: int, log: MeasurementLog, answers: Answers
) -> None:
    """Measure everything about the items that the log lacks.

    Args:
        items: names of the items.
        plan: what to measure.
        layers: of :func:`layer_count`.
        log: gets ``local/ITEM`` (``heads/ITEM`` by head), ``layer/ITEM/L``, ``part/ITEM/P`` and ``all/ITEM``.
        answers: answers a :class:`RunRequest`, as :class:`RequestedRuns` does.

    Raises:
        DitAttnError: the dense run is not finite, or has no attention call that can be made sparse.
    """
    wanted: dict[str, RunRequest] = {}
    for item in items:
        wanted[plan.local_key(item)] = RunRequest(item, "every density, call by call")
        for key, cells in sparse_runs(item, plan, layers).items():
            densities = np.ones((plan.parts, layers))
            densities[cells] = plan.density
            label = " ".join([*key.split("/")[::2], "sparse"])
            wanted[key] = RunRequest(item, label, plan.with_densities(densities).to_dict())
    missing = [key for key in wanted if key not in log.rows]
    for position, found in answers([dataclasses.asdict(wanted[key]) for key in missing]):
        key = missing[position]
        log.add(key, found if wanted[key].method is None else found["error"])
