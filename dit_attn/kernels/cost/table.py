"""Measured ratios of sparse to dense attention on one machine, and the ratio to expect of a call between them."""

from __future__ import annotations

import functools
import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

PROVENANCES = {
    "measured": "measured on this machine",
    "shipped": "shipped, measured on the same hardware",
    "guess": "a careful guess, not measured",
}
KERNELS = 2
"""Generation of the kernels, raised when their speed changes; measurements of another one are not used."""
Curve = tuple[tuple[float, float], ...]  # (density, ratio), rising in both


@dataclass(frozen=True)
class Machine:
    """What ratios hold for.

    Attributes:
        device: type of the device, e.g. ``"cpu"``.
        hardware: name of the processor and its cores, or of the accelerator.
        threads: of torch on a CPU, 0 elsewhere.
        torch: version of torch.
        kernels: generation of the kernels that were measured, :data:`KERNELS`.
        compiled: whether the C++ kernel was among them.
    """

    device: str
    hardware: str
    threads: int
    torch: str
    kernels: int
    compiled: bool = False

    def __str__(self) -> str:
        threads = f", {self.threads} thread{'s' * (self.threads != 1)}" if self.threads else ""
        return f"{self.hardware}{threads}, torch {self.torch}"


@dataclass(frozen=True)
class Cost:
    """The measurement of one shape.

    Attributes:
        head_dim: D.
        dtype: name of the type of q, k and v.
        tokens: S, of queries and keys.
        density: computed blocks as a fraction of all, in (0, 1].
        ratio: time of selecting the blocks and of the sparse call over that of the fastest dense call.
        backend: kernel of the sparse call; where several were timed, the fastest, or the preferred one if none was
            clearly faster.
        slower: the others that were timed in turns with it, in order; empty where no other was.
        seconds: of the fastest dense call, for one head of one sample; 0 where unknown.
    """

    head_dim: int
    dtype: str
    tokens: int
    density: float
    ratio: float
    backend: str = ""
    slower: tuple[str, ...] = ()
    seconds: float = 0.0


@dataclass(frozen=True)
class CostTable:
    """Ratios of sparse to dense attention on one machine.

    Attributes:
        machine: where they were measured.
        costs: the measurements.
        provenance: ``measured`` (here), ``shipped`` or ``guess``.
        note: what else a user should know: the record of shipped figures, the reason for a guess.
        fixed: seconds that a sparse call of a method takes on top of its ratio, whatever its size.
    """

    machine: Machine
    costs: tuple[Cost, ...]
    provenance: str = "measured"
    note: str = ""
    fixed: float = 0.0

    def expected(self, tokens: int, head_dim: int, dtype: torch.dtype | str, density: float) -> float:
        """Return the time of a sparse call, selection included, as a fraction of a dense one.

        Linear in density and in the logarithm of the tokens, and never falling with density or rising with tokens,
        whatever the noise of the measurements. Above the largest measured size its ratio holds; between two head sizes
        the larger ratio of both. 1 where nothing is known: below the smallest measured tokens or head size, and for
        types that were not measured.

        Args:
            tokens: S.
            head_dim: D.
            dtype: type of q, k and v.
            density: of the key blocks, in (0, 1].
        """
        if self.unknown(tokens, head_dim, dtype) is not None:
            return 1.0
        return max(_at(curves, tokens, density) for curves in _near(_sizes(self.costs, _name(dtype)), head_dim))

    def fixed_part(self, tokens: int, head_dim: int, dtype: torch.dtype | str, heads: int) -> float:
        """Return ``fixed`` as a fraction of the time of a dense call; 0 where that is unknown.

        The time of a dense call is that of the nearest measured tokens and head size, and grows with the square of the
        tokens and with the head size.

        Args:
            tokens: S.
            head_dim: D.
            dtype: type of q, k and v.
            heads: of all samples of the call.
        """
        known = [cost for cost in self.costs if cost.seconds and cost.dtype == _name(dtype)]
        if not known or not self.fixed:
            return 0.0
        near = min(known, key=lambda cost: (_apart(cost.tokens, tokens), _apart(cost.head_dim, head_dim)))
        dense = near.seconds * (tokens / near.tokens) ** 2 * (head_dim / near.head_dim) * heads
        return self.fixed / dense

    def unknown(self, tokens: int, head_dim: int, dtype: torch.dtype | str) -> str | None:
        """Return why no gain is assumed for calls of a shape, or ``None``; arguments as for :meth:`expected`."""
        name = _name(dtype)
        sizes = _sizes(self.costs, name)
        if not self.costs:
            return f"nothing is known of {self.machine.device} here"
        if not sizes:
            return f"{name} was not measured"
        if head_dim < min(sizes):
            return f"heads of {head_dim} are smaller than the smallest measured, {min(sizes)}"
        least = max(curves[0][0] for curves in _near(sizes, head_dim))
        return f"{tokens:,} tokens are fewer than the fewest measured, {least:,}" if tokens < least else None

    def nearest_comparison(self, tokens: int, head_dim: int, dtype: torch.dtype | str, density: float) -> Cost | None:
        """Return the measurement nearest to a call in which several backends were timed, ``None`` without one.

        The nearest head size counts first, then tokens, then density, each by its ratio. Arguments as for
        :meth:`expected`.
        """
        name = _name(dtype)

        def distance(cost: Cost) -> tuple[float, ...]:
            pairs = ((cost.head_dim, head_dim), (cost.tokens, tokens), (cost.density, density))
            return tuple(_apart(a, b) for a, b in pairs)

        return min((cost for cost in self.costs if cost.slower and cost.dtype == name), key=distance, default=None)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values: the machine and the measurements."""
        costs = [_row(cost) for cost in self.costs]
        return {"machine": asdict(self.machine), "fixed_seconds": self.fixed, "costs": costs}

    @staticmethod
    def from_dict(data: Any, provenance: str = "measured", note: str = "") -> CostTable:
        """Return the table described by :meth:`to_dict`.

        Raises:
            ValueError: it is no such description; the message is a short clause.
        """
        try:
            machine = Machine(**{key: kind(data["machine"][key]) for key, kind in _MACHINE.items()})
            costs = tuple(_cost(row) for row in data["costs"])
            fixed = _seconds(data["fixed_seconds"])
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ValueError("a table in it is not as dit-attn writes it") from error
        return CostTable(machine, costs, provenance, note, fixed)

    def __str__(self) -> str:
        note = f"; {self.note}" if self.note else ""
        where = f": {self.machine}" if self.provenance != "guess" else ""
        return f"{PROVENANCES[self.provenance]}{where}{note}"


_MACHINE = {"device": str, "hardware": str, "threads": int, "torch": str, "kernels": int, "compiled": bool}


def _row(cost: Cost) -> dict[str, Any]:
    row = asdict(cost)
    optional = {"slower": list(row.pop("slower")), "seconds": row.pop("seconds")}
    return {**row, **{name: value for name, value in optional.items() if value}}


def _cost(row: Any) -> Cost:
    found = Cost(
        int(row["head_dim"]), str(row["dtype"]), int(row["tokens"]), float(row["density"]), float(row["ratio"]),
        str(row.get("backend", "")), tuple(map(str, row.get("slower", ()))),
        _seconds(row.get("seconds", 0.0)),
    )  # fmt: skip
    if not (found.head_dim > 0 < found.tokens and 0.0 < found.density <= 1.0 and 0.0 < found.ratio < math.inf):
        raise ValueError
    return found


def _seconds(value: Any) -> float:
    if not 0.0 <= (found := float(value)) < math.inf:
        raise ValueError
    return found


def _apart(a: float, b: float) -> float:
    return abs(math.log(a / b))


def _name(dtype: torch.dtype | str) -> str:
    return str(dtype).removeprefix("torch.")


@functools.lru_cache(maxsize=64)
def _sizes(costs: tuple[Cost, ...], dtype: str) -> dict[int, list[tuple[int, Curve]]]:
    """By head size, the curve of ratio over density of every number of tokens, in order of tokens."""
    mine = [cost for cost in costs if cost.dtype == dtype]
    return {size: _curves([cost for cost in mine if cost.head_dim == size]) for size in {c.head_dim for c in mine}}


def _near(sizes: dict[int, list[tuple[int, Curve]]], head_dim: int) -> list[list[tuple[int, Curve]]]:
    """The curves of the measured head sizes on either side of one that is at least the smallest."""
    below, above = [size for size in sizes if size <= head_dim], [size for size in sizes if size >= head_dim]
    return [sizes[size] for size in {max(below), min(above, default=max(below))}]


def _curves(costs: Sequence[Cost]) -> list[tuple[int, Curve]]:
    """Curves that rise with density and fall with tokens: a smaller size is at least as slow as a larger one."""
    found: list[tuple[int, Curve]] = []
    for tokens in sorted({cost.tokens for cost in costs}, reverse=True):
        points = dict(sorted((cost.density, cost.ratio) for cost in costs if cost.tokens == tokens))
        points.setdefault(1.0, 1.0)
        larger = found[-1][1] if found else ()
        for density, _ in larger:
            points.setdefault(density, _between(sorted(points.items()), density))
        slow = {density: max(ratio, _between(larger, density)) for density, ratio in points.items()}
        found.append((tokens, tuple(_rising(sorted(slow.items())))))
    return found[::-1]


def _rising(points: Iterable[tuple[float, float]]) -> Iterable[tuple[float, float]]:
    highest = 0.0
    for density, ratio in points:
        highest = max(highest, ratio)
        yield density, highest


def _at(curves: Sequence[tuple[int, Curve]], tokens: int, density: float) -> float:
    """The ratio at a number of tokens that is at least the smallest measured."""
    logs = [(math.log(size), _between(curve, density)) for size, curve in curves]
    return _between(logs, math.log(tokens))


def _between(points: Sequence[tuple[float, float]], x: float) -> float:
    """The value at ``x`` on the line through ``points``, whose ends go on level; 0 without points."""
    if not points:
        return 0.0
    right = bisect_right([point[0] for point in points], x)
    if right in (0, len(points)):
        return points[min(right, len(points) - 1)][1]
    (x0, y0), (x1, y1) = points[right - 1], points[right]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
