"""Rotary position embedding (RoPE, arXiv 2104.09864): measure the frequencies of a model's tables, and move its tokens.

A table has a cosine and a sine for every token and column; the angle of column c is linear in the token's coordinates,
``angle = sum over axes of frequency[axis, c] * coordinate[axis]``. What a model chose (base, columns per axis, their
order, pairs side by side or in halves) need not be known: the frequencies are the differences of neighboring tokens.

Differences are known modulo a full turn. The columns of an axis form a geometric sequence whose slow end turns less
than half a turn per token; from there each column's full turns follow from those of the two before it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from dit_attn.errors import DitAttnError
from dit_attn.processors.core.positions import AXES
from dit_attn.processors.core.tokens import Span, Tokens

_STILL = 1e-6  # radians: columns that turn less along an axis belong to another
_DOUBT = 1.0  # radians between the predicted turn of a column and the measured one
_EVEN = 1e-3  # spacings of tokens that differ by less, relatively, are equal
_CHUNK = 1 << 22  # elements turned at once


@dataclass(frozen=True)
class RotaryGrid:
    """What the tables of a forward say of the visual tokens.

    Attributes:
        frequencies: (3, K) fp64, radians per token along t, h, w.
        known: whether the frequencies along an axis are known: they are not where it is one token long.
        coordinates: (Sv, 3) fp64 of the visual tokens, NaN where unknown.
        rows: (Sv,) rows of the visual tokens in the tables.
    """

    frequencies: torch.Tensor
    known: tuple[bool, bool, bool]
    coordinates: torch.Tensor
    rows: torch.Tensor


def measure_grid(
    cos: torch.Tensor, sin: torch.Tensor, tokens: Tokens, frequencies: torch.Tensor | None = None
) -> RotaryGrid:
    """Measure frequencies and coordinates from the tables of a model.

    Args:
        cos, sin: (S, K), any dtype; their common amplitude does not matter.
        tokens: the rows; their visual spans have grids.
        frequencies: (3, K) radians per token, for tables in which every column turns along several axes.

    Raises:
        DitAttnError: the tables are not those of a grid, or mix the axes and no frequencies are given.
    """
    visual = tokens.visual
    main = next((span for span in visual if span.kind != "reference"), visual[0])
    rows = torch.cat([torch.arange(span.start, span.stop) for span in visual])
    if main.grid is None:
        raise DitAttnError("positions cannot be moved: the grid of the visual tokens is unknown")
    steps = [None if main.grid[axis] == 1 else _turns(_line(cos, sin, main, axis)) for axis in range(3)]
    moving = [torch.zeros(cos.shape[1], dtype=torch.bool) if x is None else (x.abs() > _STILL).any(0) for x in steps]
    gaps: list[torch.Tensor] = [torch.ones(size - 1, dtype=torch.float64) for size in main.grid]
    mixed = bool((torch.stack(moving).sum(0) > 1).any())
    if frequencies is not None:
        found = frequencies.double().cpu()
    elif mixed:
        found = _raster_frequencies(steps, main.grid)
    else:
        found = torch.zeros(3, cos.shape[1], dtype=torch.float64)
        for axis, turns in enumerate(steps):
            if turns is not None and moving[axis].any():
                found[axis, moving[axis]], gaps[axis] = _axis_frequencies(turns[:, moving[axis]], AXES[axis])
    start = _row(cos, sin, main.start)
    coordinates = []
    for span in visual:
        if span is main:
            lines = [_positions(gap) for gap in gaps]
        elif span.grid is None or mixed or frequencies is not None:
            coordinates.append(torch.full((span.length or 0, 3), math.nan, dtype=torch.float64))
            continue
        else:
            lines = [_reference_line(cos, sin, span, axis, found[axis], start) for axis in range(3)]
        coordinates.append(torch.stack(torch.meshgrid(*lines, indexing="ij"), -1).reshape(-1, 3))
    known = tuple(bool(found[axis].any()) for axis in range(3))
    return RotaryGrid(found, (known[0], known[1], known[2]), torch.cat(coordinates), rows)


def turn_tables(
    cos: torch.Tensor, sin: torch.Tensor, grid: RotaryGrid, moved: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tables with the visual tokens moved; rows that stay keep every bit.

    Args:
        cos, sin: (S, K).
        grid: what :func:`measure_grid` found.
        moved: (Sv, 3) tokens along t, h, w.

    Raises:
        DitAttnError: a token moves along an axis on which no two tokens lie, or from an unknown place.
    """
    if bool(moved.isnan().any()):
        raise DitAttnError("positions cannot be scaled: where the model places its reference tokens is unknown")
    for axis, name in enumerate(AXES):
        if not grid.known[axis] and bool((moved[:, axis] != 0).any()):
            raise DitAttnError(
                f"positions cannot be moved along {name}: the input is one token long there, or the model has no "
                "rotary columns for it"
            )
    some = moved.any(1)
    rows, moved = grid.rows[some].to(cos.device), moved[some]
    exact = torch.float32 if cos.device.type == "mps" else torch.float64
    frequencies = grid.frequencies.to(cos.device, exact)
    out = cos.clone(), sin.clone()
    size = max(1, _CHUNK // cos.shape[1])
    for part, delta in zip(rows.split(size), moved.to(cos.device, exact).split(size)):
        angle = delta @ frequencies
        x, y, c, s = cos[part].to(exact), sin[part].to(exact), angle.cos(), angle.sin()
        out[0][part] = (x * c - y * s).to(cos.dtype)
        out[1][part] = (y * c + x * s).to(sin.dtype)
    return out


def _row(cos: torch.Tensor, sin: torch.Tensor, rows: int | torch.Tensor) -> torch.Tensor:
    """Rows of the tables as complex128 numbers on the host."""
    return torch.complex(cos[rows].cpu().double(), sin[rows].cpu().double())


def _line(cos: torch.Tensor, sin: torch.Tensor, span: Span, axis: int) -> torch.Tensor:
    """(N, K) of the tokens along an axis, from the first token of a span."""
    assert span.grid is not None
    stride = math.prod(span.grid[axis + 1 :])
    return _row(cos, sin, span.start + stride * torch.arange(span.grid[axis], device=cos.device))


def _turns(line: torch.Tensor) -> torch.Tensor:
    """(N - 1, K) angles between neighbors, in [-pi, pi]."""
    return (line[1:] * line[:-1].conj()).angle()


def _wrapped(angle: torch.Tensor) -> torch.Tensor:
    return torch.remainder(angle + math.pi, 2 * math.pi) - math.pi


def _positions(gaps: torch.Tensor) -> torch.Tensor:
    return torch.cat([gaps.new_zeros(1), gaps.cumsum(0)])


def _axis_frequencies(turns: torch.Tensor, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Frequencies of the columns of one axis, and the spacing of its tokens in units of the most common one.

    Args:
        turns: (N - 1, K) angles between neighbors.
        name: of the axis, for messages.
    """
    first: dict[bytes, int] = {}
    owner = [first.setdefault(column.numpy().tobytes(), len(first)) for column in turns.T.contiguous()]
    distinct = torch.stack([turns[:, owner.index(k)] for k in range(len(first))], 1)
    doubt, _, order, speed = min(_ladders(distinct[-1]), key=lambda found: found[:2])
    if doubt > _DOUBT:
        raise DitAttnError(f"positions cannot be moved along {name}: the columns of the rotary tables are not regular")
    theta = torch.empty_like(speed)
    theta[order] = speed
    gaps = _distances(distinct, theta)
    usual = gaps.median()
    gaps, theta = gaps / usual, theta * usual
    if bool(((gaps - 1).abs() < _EVEN).all()):
        gaps = torch.ones_like(gaps)
    total = gaps[:, None] * theta
    theta = (total + _wrapped(distinct - total)).sum(0) / gaps.sum()
    return theta[torch.tensor(owner)], gaps


def _ladders(turns: torch.Tensor) -> Iterator[tuple[float, float, torch.Tensor, torch.Tensor]]:
    """Full angles of the columns from either end: (largest deviation, first angle, order, angles in that order)."""
    count = len(turns)
    for order in (torch.arange(count), torch.arange(count).flip(0)):
        angles: list[float] = []
        doubt = 0.0
        for turn in turns[order].tolist():
            if len(angles) >= 2:
                expected = angles[-1] ** 2 / angles[-2] if angles[-2] else turn
                turn += 2 * math.pi * round((expected - turn) / (2 * math.pi))
                doubt = max(doubt, abs(turn - expected))
            angles.append(turn)
        yield doubt, abs(angles[0]), order, torch.tensor(angles, dtype=torch.float64)


def _distances(turns: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
    """(m,) distances, in tokens, that turn the columns by ``turns`` (m, K) modulo full turns; slow columns first."""
    order = theta.abs().argsort()
    found = turns[:, order[0]] / theta[order[0]]
    for column in order[1:].tolist():
        full = ((found * theta[column] - turns[:, column]) / (2 * math.pi)).round()
        found = (turns[:, column] + 2 * math.pi * full) / theta[column]
    return found


def _reference_line(
    cos: torch.Tensor, sin: torch.Tensor, span: Span, axis: int, theta: torch.Tensor, start: torch.Tensor
) -> torch.Tensor:
    """Coordinates along an axis of the tokens of a reference, relative to the first token of the main grid."""
    assert span.grid is not None
    used = theta != 0
    if not used.any():
        return torch.zeros(span.grid[axis], dtype=torch.float64)
    line = torch.cat([start[None], _line(cos, sin, span, axis)])[:, used]
    return _distances(_turns(line), theta[used]).cumsum(0)


def _raster_frequencies(steps: list[torch.Tensor | None], grid: tuple[int, int, int]) -> torch.Tensor:
    """Frequencies of tables that number the tokens in one dimension: a step along h is W tokens, along t H * W.

    Raises:
        DitAttnError: the tables are no such ones.
    """
    _, height, width = grid
    last = steps[2]
    theta = None if last is None else last.mean(0)
    for turns, stride in zip(steps, (height * width, width, 1)):
        off = theta is None or (turns is not None and bool((_wrapped(turns - stride * theta).abs() > _EVEN).any()))
        if off:
            raise DitAttnError(
                "positions cannot be moved: every column of the rotary tables turns along several axes, and their "
                "frequencies are not given"
            )
    assert theta is not None
    return theta * torch.tensor([[height * width], [width], [1]], dtype=torch.float64)
