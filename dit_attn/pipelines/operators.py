"""How far methods are from dense attention where they act: every call of dense runs, repeated by every method.

The runs stay dense, so all methods see the same queries, keys and values, and an error does not grow from layer to
layer. What a method remembers from step to step is kept for each of them.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch

from dit_attn.api import disable, observing
from dit_attn.eval import errors
from dit_attn.pipelines import scores
from dit_attn.processors import engage, executor
from dit_attn.processors.executor import AttentionCall, Request
from dit_attn.processors.method import Method

FLOOR = 1e-7  # an error of zero has no logarithm


class Probe:
    """An observer that runs one method on every call it is shown.

    Attributes:
        label: name of the method.
        method: its settings; dense steps and layers are its own.
        calls: one entry an engaged call: layer, step, branch, ``l2``, ``shift``, ``cost`` (share of the dense map) and
            ``seconds``.
    """

    def __init__(self, label: str, method: Method) -> None:
        self.label, self.method = label, method
        self.calls: list[dict[str, Any]] = []
        self._sites: dict[str, Any] = {}

    def begin(self) -> None:
        """A new run begins."""
        self._sites.clear()

    def __call__(self, call: AttentionCall, request: Request, exact: torch.Tensor) -> None:
        """Run the method on ``call`` and compare with ``exact`` (B, S, H, D)."""
        if executor.unfit(call):
            return
        real = call.site
        site = self._sites.setdefault(
            real.name, SimpleNamespace(name=real.name, index=real.index, session=real.session, memory={})
        )
        site.rows = real.rows
        mine = dataclasses.replace(call, site=site)
        asked = Request()
        if executor.read_mask(mine, asked, real.session.family.mask_rule):
            return
        started = time.perf_counter()
        self.method.request(mine, asked)
        if asked.empty:
            return
        out = executor.run(mine, asked, executor.dense_rows(mine))
        seconds = time.perf_counter() - started
        assert call.tokens is not None and call.tokens.visual_range is not None
        visual = slice(*call.tokens.visual_range)
        self.calls.append(
            {
                "layer": real.index,
                "step": call.clock.step,
                "branch": call.branches[0],
                "l2": errors.relative_l2(out[:, visual], exact[:, visual]),
                "shift": errors.mean_shift(out[:, visual], exact[:, visual]),
                "cost": float(engage.executed_share(mine, asked)),
                "seconds": seconds,
            }
        )


def measure(
    pipe: Any, prompts: Sequence[str], methods: dict[str, Method], *, seed: int = 0, call: dict[str, Any] | None = None
) -> list[dict[str, Any]]:
    """One row a method: its errors over all calls it would carry out, and what it computes.

    Args:
        pipe: a stock pipeline; methods on it are taken off.
        prompts: texts; each is one dense run, and the intervals are over them.
        methods: by label.
        seed: of the first run; the next ones follow.
        call: further arguments of the pipeline's call.

    Returns:
        Rows with ``label``, ``method``, ``calls``, ``cost`` and ``seconds`` (means), ``l2`` and ``shift`` (geometric
        means over the calls of a run, with 95 % intervals over runs), and ``by_layer`` (geometric means of ``l2``).
    """
    disable(pipe)
    probes = [Probe(label, method) for label, method in methods.items()]
    bounds: dict[str, list[int]] = {probe.label: [0] for probe in probes}

    def observe(seen: AttentionCall, request: Request, out: torch.Tensor) -> None:
        for probe in probes:
            probe(seen, request, out)

    for index, prompt in enumerate(prompts):
        for probe in probes:
            probe.begin()
        generator = torch.Generator("cpu").manual_seed(seed + index)
        with observing(pipe, observe), torch.no_grad():
            pipe(prompt, generator=generator, output_type="latent", **(call or {}))
        for probe in probes:
            bounds[probe.label].append(len(probe.calls))
    return [_row(probe, bounds[probe.label]) for probe in probes]


def _row(probe: Probe, bounds: list[int]) -> dict[str, Any]:
    runs = [probe.calls[low:high] for low, high in pairwise(bounds)]
    layers = sorted({found["layer"] for found in probe.calls})
    return {
        "label": probe.label,
        "method": probe.method.to_dict(),
        "calls": len(probe.calls),
        "cost": _mean([found["cost"] for found in probe.calls]),
        "seconds": _mean([found["seconds"] for found in probe.calls]),
        "l2": _over_runs(runs, "l2"),
        "shift": _over_runs(runs, "shift"),
        "by_layer": {layer: _geometric([c["l2"] for c in probe.calls if c["layer"] == layer]) for layer in layers},
    }


def _over_runs(runs: list[list[dict[str, Any]]], key: str) -> dict[str, Any] | None:
    """Geometric mean of a figure, with its interval over runs."""
    logs = [_log_mean([found[key] for found in run]) for run in runs if run]
    figure = scores.mean_figure(logs)
    if figure is None:
        return None
    interval = figure["ci95"] and [math.exp(end) for end in figure["ci95"]]
    return {**figure, "value": math.exp(figure["value"]), "ci95": interval}


def _log_mean(values: list[float]) -> float:
    return sum(math.log(max(value, FLOOR)) for value in values) / len(values)


def _geometric(values: list[float]) -> float:
    return math.exp(_log_mean(values))


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
