"""How far methods are from dense attention where they act: every call of dense runs, repeated by every method.

The runs stay dense, so all methods see the same queries, keys and values, and an error does not grow from layer to
layer. What a method remembers from step to step is kept for each of them. Calls come from a pipeline, or from random
fields with the structure of pictures.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, cast

import torch

from dit_attn.api import disable, observing
from dit_attn.eval import errors
from dit_attn.kernels.synthetic import STRUCTURES, Grid, structured_qkv
from dit_attn.pipelines import scores
from dit_attn.processors import engage, executor
from dit_attn.processors.clock import Clock
from dit_attn.processors.executor import AttentionCall, Request
from dit_attn.processors.method import Method
from dit_attn.processors.tokens import TokenLayout, visual_span

FLOOR = 1e-7  # an error of zero has no logarithm


class Probe:
    """An observer that runs one method on the calls it is shown.

    Attributes:
        label: name of the method.
        method: its settings; dense steps and layers are its own.
        every: run it at one step of so many, in the middle of them; 1 for methods that remember.
        calls: one entry an engaged call: run, layer, step, branch, ``l2``, ``shift``, ``cost`` (share of the dense map)
            of attention and of the ranking of pieces) and ``seconds`` (selection counted).
    """

    def __init__(self, label: str, method: Method, every: int = 1) -> None:
        self.label, self.method, self.every = label, method, every
        self.calls: list[dict[str, Any]] = []
        self._sites: dict[str, Any] = {}
        self._run = -1

    def begin(self, run: int) -> None:
        """A new run begins."""
        self._sites.clear()
        self._run = run

    def __call__(self, call: AttentionCall, request: Request, exact: torch.Tensor) -> None:
        """Run the method on ``call`` and compare with ``exact`` (B, S, H, D)."""
        if executor.unfit(call) or call.clock.step % self.every != self.every // 2:
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
                "run": self._run,
                "layer": real.index,
                "step": call.clock.step,
                "branch": call.branches[0] if call.branches else "",
                "l2": errors.relative_l2(out[:, visual], exact[:, visual]),
                "shift": errors.mean_shift(out[:, visual], exact[:, visual]),
                "cost": float(engage.executed_share(mine, asked)) + ranking_share(self.method),
                "seconds": seconds,
            }
        )


def ranking_share(method: Method) -> float:
    """What ranking blocks by their pieces costs, as a share of dense attention; 0 where whole blocks are ranked.

    Dense attention is two products of S x S x D. A map of pieces needs one, the error of a piece two more.
    """
    probe = getattr(method, "probe", None)
    if probe is None:
        return 0.0
    return (1.5 if getattr(method, "select", "") == "error" else 0.5) / probe**2


Observer = Callable[[AttentionCall, Request, torch.Tensor], None]
Source = Callable[[int, Observer], None]
"""``source(run, observer)`` carries out one dense run and shows every attention call of it."""


def pipeline_source(
    pipe: Any, prompts: Sequence[str], *, seed: int = 0, call: dict[str, Any] | None = None
) -> Source:
    """Dense runs of a stock pipeline, one a prompt; methods on it are taken off.

    Args:
        pipe: the pipeline.
        prompts: texts.
        seed: of the first run; the next ones follow.
        call: further arguments of the pipeline's call.
    """
    disable(pipe)

    def source(run: int, observer: Observer) -> None:
        generator = torch.Generator("cpu").manual_seed(seed + run)
        with observing(pipe, observer), torch.no_grad():
            pipe(prompts[run], generator=generator, output_type="latent", **(call or {}))

    return source


def synthetic_source(grid: Grid, *, heads: int = 1, dim: int = 64, steps: int = 8, seed: int = 0) -> Source:
    """Runs of random fields: every structure of :data:`~dit_attn.kernels.synthetic.STRUCTURES` is a layer.

    Args:
        grid: (T, H, W) tokens.
        heads, dim: of a layer.
        steps: of a run.
        seed: of the first run; the next ones follow.
    """
    kind = "video" if grid[0] > 1 else "image"
    tokens = TokenLayout((visual_span(kind, grid),)).resolve(math.prod(grid))
    session = SimpleNamespace(layer_count=len(STRUCTURES), family=SimpleNamespace(mask_rule="key"))

    def source(run: int, observer: Observer) -> None:
        for index, (name, structure) in enumerate(STRUCTURES.items()):
            site = cast(Any, SimpleNamespace(name=name, index=index, session=session, rows=(0, 1)))
            for step, qkv in enumerate(structured_qkv(structure, grid, heads, dim, steps, seed + run)):
                clock = Clock(run=run, step=step, total=steps)
                call = AttentionCall(*qkv, None, None, False, site, tokens, clock)
                observer(call, Request(), executor.dense_rows(call)(*qkv, None))

    return source


def measure(source: Source, runs: int, probes: Sequence[Probe]) -> dict[str, Any]:
    """Show every call of ``runs`` runs to every probe.

    Args:
        source: of the calls.
        runs: how many; intervals are over them.
        probes: they keep what they found.

    Returns:
        ``calls`` and ``dense_seconds`` (mean time of torch's own attention on the same calls), ``tokens``.
    """
    dense: list[float] = []
    lengths: set[int] = set()

    def observe(seen: AttentionCall, request: Request, out: torch.Tensor) -> None:
        if executor.unfit(seen):
            return
        for probe in probes:
            probe(seen, request, out)
        started = time.perf_counter()
        executor.dense_rows(seen)(seen.q, seen.k, seen.v, seen.mask)
        dense.append(time.perf_counter() - started)
        lengths.add(seen.q.shape[1])

    for run in range(runs):
        for probe in probes:
            probe.begin(run)
        with torch.no_grad():
            source(run, observe)
    return {"calls": len(dense), "dense_seconds": _mean(dense), "tokens": sorted(lengths)}


def row(probe: Probe) -> dict[str, Any]:
    """What a probe found.

    Returns:
        ``label``, ``method``, ``calls``, ``cost`` and ``seconds`` (means over all calls, refreshes among them), ``l2``
        and ``shift`` (geometric means over the calls that are not exact), ``rms`` (root of the mean square of ``l2``
        over all calls), each with a 95 % interval over runs, and ``by_layer`` (geometric means of ``l2``).
    """
    inexact = [found for found in probe.calls if found["cost"] < 1.0]
    layers = sorted({found["layer"] for found in inexact})
    return {
        "label": probe.label,
        "method": probe.method.to_dict(),
        "calls": len(probe.calls),
        "cost": _mean([found["cost"] for found in probe.calls]),
        "seconds": _mean([found["seconds"] for found in probe.calls]),
        "l2": over_runs(log_errors(probe.calls, "l2")),
        "shift": over_runs(log_errors(probe.calls, "shift")),
        "rms": over_runs(log_errors(probe.calls, "rms")),
        "by_layer": {
            layer: math.exp(_mean([_log(c["l2"]) for c in inexact if c["layer"] == layer]) or 0.0) for layer in layers
        },
    }


def log_errors(calls: Sequence[dict[str, Any]], key: str) -> dict[int, float]:
    """By run: logarithm of the geometric mean of ``l2`` or ``shift`` over inexact calls, or of the ``rms`` over all."""
    found: dict[int, list[float]] = {}
    for call in calls:
        if key == "rms":
            found.setdefault(call["run"], []).append(call["l2"] ** 2)
        elif call["cost"] < 1.0:
            found.setdefault(call["run"], []).append(_log(call[key]))
    means = {run: sum(values) / len(values) for run, values in found.items()}
    return {run: 0.5 * math.log(max(mean, FLOOR**2)) for run, mean in means.items()} if key == "rms" else means


def over_runs(logs: dict[int, float]) -> dict[str, Any] | None:
    """Geometric mean of values given as logarithms, with its 95 % bootstrap interval over runs; ``None`` of none."""
    figure = scores.mean_figure(list(logs.values()))
    if figure is None:
        return None
    interval = figure["ci95"] and [math.exp(end) for end in figure["ci95"]]
    return {"value": math.exp(figure["value"]), "ci95": interval, "n": figure["n"]}


def _log(value: float) -> float:
    return math.log(max(value, FLOOR))


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
