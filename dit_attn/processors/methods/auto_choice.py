"""Which sparse method pays for an attention call, and why: decided from its shape, its run and a cost table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dit_attn.kernels.cost import CostTable
from dit_attn.processors.methods.base import Grid
from dit_attn.processors.methods.sparse import SparseMethod

FREE_PART = 0.25
"""Part of the free memory that a method's cache may take."""


@dataclass(frozen=True)
class RunShape:
    """What a decision depends on.

    Attributes:
        tokens: S, text included.
        grid: (T, H, W) of the visual ones, of the first image or video where there are several.
        visual: visual tokens.
        heads, head_dim: H, D.
        dtype: name of the type of q, k and v.
        device: type of the device.
        steps: of the run, ``None`` where nobody says how many.
        layers: of the transformer.
        samples: rows of the batch, those of all guidance branches.
        batch: rows of one call.
        devices: that share the heads of the call, and have to decide alike.
    """

    tokens: int
    grid: Grid
    visual: int
    heads: int
    head_dim: int
    dtype: str
    device: str
    steps: int | None
    layers: int
    samples: int = 2
    batch: int = 1
    devices: int = 1

    @property
    def is_video(self) -> bool:
        """Whether the visual tokens have more than one frame."""
        return self.grid[0] > 1

    @property
    def element(self) -> int:
        """Bytes of an activation."""
        return {"float64": 8, "float32": 4}.get(self.dtype, 2)


@dataclass(frozen=True)
class Decision:
    """What was decided for the calls of a shape.

    Attributes:
        shape: the shape.
        method: the method that computes them, ``None`` for dense attention.
        reason: why this one, or why none.
        ratio: expected time of a sparse call as a fraction of a dense one; ``None`` for dense attention.
        settings: where the settings are from.
        table: what the costs are from.
    """

    shape: RunShape
    method: SparseMethod | None
    reason: str
    ratio: float | None
    settings: str
    table: str

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        method = self.method.to_dict() if self.method is not None else None
        values = {name: getattr(self, name) for name in ("reason", "ratio", "settings", "table")}
        said = "\n".join(self.lines())
        return {"tokens": self.shape.tokens, "steps": self.shape.steps, "method": method, **values, "text": said}

    def lines(self) -> list[str]:
        """Return it in words: the method, why, its settings, the costs."""
        method, steps = self.method, self.shape.steps
        if method is None or self.ratio is None:
            return [f"dense: {self.reason}", f"costs: {self.table}"]
        said = [method.slug]
        if isinstance(budget := getattr(method, "density", None), float):
            said.append(f"density {budget:g}")
        if steps:
            first, last = method.sparse_range(steps)
            said.append(f"{steps - max(0, last - first)} of {steps} steps dense")
        if method.max_error is not None:
            said.append(f"error of a layer at most {method.max_error:g}")
        return [
            f"{', '.join(said)}: {self.reason}",
            f"a sparse call is expected to take {self.ratio:.2f} of a dense one, at {self.shape.tokens:,} tokens",
            f"settings: {self.settings}",
            f"costs: {self.table}",
        ]


def choose(
    candidates: Sequence[tuple[SparseMethod, str]],
    shape: RunShape,
    table: CostTable,
    *,
    few_steps: int,
    least_gain: float,
    free: int | None,
) -> Decision:
    """Return the first candidate that is expected to gain on calls of a shape, or dense attention with the reasons.

    Args:
        candidates: methods and where their settings are from, best first.
        shape: of the calls.
        table: costs of the device.
        few_steps: a run of fewer steps, or of unknown many, takes no method with statistics of earlier steps.
        least_gain: how many times as fast as a dense call a sparse one has to be.
        free: bytes of memory, ``None`` where they are unknown.
    """
    unknown = table.unknown(shape.tokens, shape.head_dim, shape.dtype)
    if unknown is not None:
        return Decision(shape, None, f"no gain is assumed, {unknown}", None, "", str(table))
    refused: list[str] = []
    for method, settings in candidates:
        problem, ratio = _problem(method, shape, table, few_steps, least_gain, free)
        if problem is None:
            first = f"the first candidate for {'videos' if shape.is_video else 'images'}"
            return Decision(shape, method, "; ".join(refused) or first, ratio, settings, str(table))
        refused.append(f"{method.slug} {problem}")
    return Decision(shape, None, "; ".join(refused) or "no candidates", None, "", str(table))


def _problem(
    method: SparseMethod, shape: RunShape, table: CostTable, few_steps: int, least_gain: float, free: int | None
) -> tuple[str | None, float | None]:
    """Why a method is not for calls of a shape, and what they are expected to take of the time of dense ones."""
    steps = shape.steps
    stored = method.cache_bytes(shape.visual, shape.heads, shape.head_dim, shape.element)
    if stored and (steps is None or steps < few_steps):
        many = "an unknown number of" if steps is None else f"{steps}"
        return f"stores statistics from step to step, which {many} steps do not repay", None
    if steps is not None and not method.phases(steps):
        return f"leaves all of {steps} steps dense", None
    needed = stored * shape.layers * shape.samples
    if free is not None and not method.cache_on_host and needed > FREE_PART * free:
        return f"would store {needed / 2**30:.1f} GiB, more than a quarter of the free memory", None

    def expected(density: float) -> float:
        return table.expected(shape.tokens, shape.head_dim, shape.dtype, density)

    found = method.relative_time(expected, shape.grid)
    if found is None:
        return "computes as much as the data asks for", None
    part = shape.visual / shape.tokens
    ratio = part * found + (1.0 - part)
    ratio += table.fixed_part(shape.tokens, shape.head_dim, shape.dtype, shape.batch * shape.heads)
    if not math.isfinite(ratio) or ratio * least_gain > 1.0:
        return f"is expected to take {ratio:.2f} of the time of a dense call", None
    return None, ratio
