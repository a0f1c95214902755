"""Rotary tables: frequencies are measured whatever a model chose, and moved tokens have the angles of the formula."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch

from dit_attn import DitAttnError
from dit_attn.processors.core.positions import PositionMap, displacement
from dit_attn.processors.core.rotary import RotaryGrid, measure_grid, turn_tables
from dit_attn.processors.core.tokens import Span, TokenLayout, Tokens, visual_span

GRID = (4, 6, 9)


@dataclass(frozen=True)
class Model:
    """How a model makes its tables.

    Attributes:
        columns: of every axis.
        base: of the geometric sequence of frequencies.
        spacing: positions from token to token, per axis.
        start: position of the first token, per axis.
        first: shorter step from the first to the second frame.
        rising: whether slow columns come first.
        order: of the columns: pairs side by side, two halves, or the axes in turns.
        heads: heads with columns of their own.
        dtype: of the tables.
        amplitude: of the tables.
    """

    columns: tuple[int, int, int] = (6, 8, 8)
    base: float = 1e4
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)
    start: tuple[float, float, float] = (0.0, 0.0, 0.0)
    first: float = 1.0
    rising: bool = False
    order: str = "pairs"
    heads: int = 1
    dtype: torch.dtype = torch.float32
    amplitude: float = 1.0

    def frequencies(self) -> list[torch.Tensor]:
        """Radians per position of the columns of every axis."""
        found = []
        for count in self.columns:
            count *= self.heads
            theta = self.base ** -(torch.arange(count, dtype=torch.float64) / count)
            found.append(theta.flip(0) if self.rising else theta)
        return found

    def positions(self, points: torch.Tensor) -> torch.Tensor:
        """(n, 3) positions of tokens at (t, h, w); the frames after the first stand ``first`` after it."""
        t, h, w = points.double().unbind(-1)
        t = torch.where(t <= 0, t, t - 1 + self.first)
        return torch.stack([t, h, w], -1) * torch.tensor(self.spacing).double() + torch.tensor(self.start).double()

    def table(self, positions: torch.Tensor, *, exact: bool = False) -> torch.Tensor:
        """(n, K) complex128; ``exact`` or in the dtype of the model's tables."""
        angles = [positions[:, axis, None] * theta for axis, theta in enumerate(self.frequencies())]
        if self.order == "turns":
            angle = torch.stack(angles, -1).flatten(1)
        elif self.heads > 1:
            angle = torch.cat([x.unflatten(1, (self.heads, -1)) for x in angles], -1).flatten(1)
        else:
            angle = torch.cat(angles, 1)
        angle = torch.cat([angle, angle], 1) if self.order == "halves" else angle.repeat_interleave(2, 1)
        table = self.amplitude * torch.polar(torch.ones_like(angle), angle)
        if exact:
            return table
        return torch.complex(*(x.to(self.dtype).double() for x in (table.real, table.imag)))


def points_of(grid: tuple[int, int, int]) -> torch.Tensor:
    """(n, 3) tokens of a grid, in raster order."""
    return torch.cartesian_prod(*(torch.arange(n, dtype=torch.float64) for n in grid))


def resolved(*spans: Span, length: int | None = None) -> Tokens:
    """The tokens of some spans."""
    tokens = TokenLayout(spans).resolve(length or sum(span.length or 0 for span in spans))
    assert tokens is not None
    return tokens


def moved(table: torch.Tensor, tokens: Tokens, dtype: torch.dtype, *maps: PositionMap) -> torch.Tensor:
    """Tables with the tokens moved."""
    cos, sin = table.real.to(dtype), table.imag.to(dtype)
    grid = measure_grid(cos, sin, tokens)
    return torch.complex(*(x.double() for x in turn_tables(cos, sin, grid, displacement(maps, grid.coordinates))))


PLAIN = Model()
MODELS = {
    "pairs": PLAIN,
    "halves": Model(order="halves"),
    "axes in turns, slow first": Model(columns=(8, 8, 8), order="turns", rising=True),
    "heads": Model(heads=3),
    "small base": Model(base=256.0),
    "several turns from token to token": Model(spacing=(7.0, 16.0, 13.5)),
    "hundreds of turns": Model(columns=(32, 32, 32), order="turns", rising=True, base=3e5, spacing=(900.0, 1800, 1800)),
    "a denser grid": Model(spacing=(0.1, 0.25, 0.25)),
    "centered": Model(start=(5.0, -3.0, -4.5)),
    "a short first step": Model(first=0.125, spacing=(8.0, 1.0, 1.0)),
    "amplitude": Model(amplitude=1.3),
    "few columns": Model(columns=(2, 1, 3)),
}


DTYPES = (torch.float64, torch.float32, torch.bfloat16)
CASES = [(name, dtype) for name in MODELS for dtype in DTYPES]
CASES.remove(("hundreds of turns", torch.bfloat16))  # fractions of a token are below the resolution of such tables


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_moved_tokens_have_the_angles_of_the_formula(name: str, dtype: torch.dtype) -> None:
    model = replace(MODELS[name], dtype=dtype)
    tokens, points = resolved(visual_span("video", GRID)), points_of(GRID)
    region = points[:, 1] > 2
    maps = (PositionMap(scale=(1.0, 0.5, 0.6), origin=(0, 1, 2)), PositionMap(offset=(0.3, -2, 1.5), region=region))
    positions = model.positions(points)
    at, by = positions - positions[0], torch.tensor(model.spacing).double()
    found = moved(model.table(positions), tokens, dtype, *maps)
    expected = model.table(positions[0] + by * (at / by + displacement(maps, at / by)), exact=True)
    error = {torch.float64: 1e-9, torch.float32: 2e-6, torch.bfloat16: 3e-2}[dtype] * model.amplitude
    error *= 1000 if name == "hundreds of turns" else 1
    torch.testing.assert_close(found, expected, atol=error, rtol=0)


def test_whole_steps_give_the_tables_of_the_model_at_the_moved_positions() -> None:
    tokens = resolved(visual_span("video", GRID))
    table = PLAIN.table(PLAIN.positions(points_of(GRID)))
    found = moved(table, tokens, torch.float32, PositionMap(offset=(0, 2, -1))).unflatten(0, GRID)
    own = table.unflatten(0, GRID)
    torch.testing.assert_close(found[:, :-2, 1:], own[:, 2:, :-1], atol=2e-7, rtol=0)


@pytest.mark.parametrize("odd", [0, 4, 7])
def test_a_token_is_the_most_common_spacing_wherever_the_odd_one_is(odd: int) -> None:
    gaps = torch.full((8,), 3.0, dtype=torch.float64)
    gaps[odd] = 2.0
    places = torch.cat([torch.zeros(1).double(), gaps.cumsum(0)])
    positions = torch.cartesian_prod(torch.zeros(1).double(), torch.arange(6).double(), places)
    table = PLAIN.table(positions)
    tokens = resolved(visual_span("image", (1, 6, 9)))
    found = moved(table, tokens, torch.float32, PositionMap(scale=(1, 1, 0.5), offset=(0, 0, 1.5)))
    expected = PLAIN.table(positions * torch.tensor([1, 1, 0.5]) + torch.tensor([0, 0, 4.5]), exact=True)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)


def test_text_padding_and_tokens_that_stay_keep_every_bit() -> None:
    tokens = resolved(Span("text", 5), visual_span("image", (1, 6, 9)), Span("padding", 2))
    table = torch.cat([torch.randn(5, 44).to(torch.complex128), PLAIN.table(points_of((1, 6, 9))), torch.zeros(2, 44)])
    found = moved(table, tokens, torch.float32, PositionMap(offset=(0, 1, 0), region=slice(9, 20)))
    stays = torch.ones(len(table), dtype=torch.bool)
    stays[5 + 9 : 5 + 20] = False
    assert torch.equal(found[stays], torch.complex(table.real.float(), table.imag.float()).to(torch.complex128)[stays])
    assert not (found == table)[~stays].all(1).any()


def test_references_are_found_where_the_model_places_them() -> None:
    main, near, coarse = points_of((2, 6, 9)), points_of((1, 4, 3)), points_of((2, 3, 4))
    near = near + torch.tensor([-1.0, 2.0, -3.0])
    coarse = coarse * torch.tensor([1.0, 2.0, 2.0]) + torch.tensor([-8.0, 0.5, 0.5])
    tokens = resolved(
        visual_span("reference", (2, 3, 4)), visual_span("video", (2, 6, 9)), visual_span("reference", (1, 4, 3))
    )
    for model in (PLAIN, MODELS["several turns from token to token"]):
        positions = [points * torch.tensor(model.spacing).double() for points in (coarse, main, near)]
        table = model.table(torch.cat(positions))
        grid = measure_grid(table.real.float(), table.imag.float(), tokens)
        torch.testing.assert_close(grid.coordinates, torch.cat([coarse, main, near]), atol=1e-4, rtol=0)
    maps = (PositionMap(scale=(1, 0.5, 0.5), origin=(0, 0, 1)),)
    found = moved(PLAIN.table(torch.cat([coarse, main, near])), tokens, torch.float32, *maps)
    points = torch.cat([coarse, main, near])
    expected = PLAIN.table(points + displacement(maps, points), exact=True)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


def test_an_axis_of_one_token_moves_nothing_and_asks_for_nothing() -> None:
    tokens, table = resolved(visual_span("image", (1, 6, 9))), PLAIN.table(points_of((1, 6, 9)))
    moved(table, tokens, torch.float32, PositionMap(scale=(0.5, 0.5, 0.5)))
    with pytest.raises(DitAttnError, match="cannot be moved along t: the input is one token long there"):
        moved(table, tokens, torch.float32, PositionMap(offset=(1, 0, 0)))


def test_a_model_without_columns_for_an_axis_cannot_move_along_it() -> None:
    model, tokens = Model(columns=(0, 8, 8)), resolved(visual_span("video", GRID))
    table = model.table(points_of(GRID))
    moved(table, tokens, torch.float32, PositionMap(offset=(0, 1, 1)))
    with pytest.raises(DitAttnError, match=r"along t: .* no rotary columns"):
        moved(table, tokens, torch.float32, PositionMap(offset=(1, 0, 0)))


def test_tokens_numbered_in_one_dimension_step_over_rows() -> None:
    theta = 1e4 ** -(torch.arange(8, dtype=torch.float64) / 8)
    number = torch.arange(4 * 6 * 9).double() + 17
    table = torch.polar(torch.ones(216, 8).double(), number[:, None] * theta)
    tokens = resolved(visual_span("video", GRID))
    found = moved(table, tokens, torch.float64, PositionMap(offset=(1, 0.5, -2)))
    expected = torch.polar(torch.ones(216, 8).double(), (number[:, None] + 54 + 4.5 - 2) * theta)
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)


def mixed() -> tuple[torch.Tensor, torch.Tensor]:
    """Tables whose columns each turn along all axes, and their frequencies."""
    frequencies = torch.randn(3, 10, generator=torch.Generator().manual_seed(0)).double()
    return torch.polar(torch.ones(216, 10).double(), points_of(GRID) @ frequencies), frequencies


def test_columns_that_mix_the_axes_need_their_frequencies() -> None:
    table, frequencies = mixed()
    tokens = resolved(visual_span("video", GRID))
    with pytest.raises(DitAttnError, match="turns along several axes, and their frequencies are not given"):
        measure_grid(table.real, table.imag, tokens)
    grid = measure_grid(table.real, table.imag, tokens, frequencies)
    moves = displacement([PositionMap(offset=(0.5, 1, -0.2))], grid.coordinates)
    found = torch.complex(*turn_tables(table.real, table.imag, grid, moves))
    by = torch.tensor([0.5, 1, -0.2], dtype=torch.float64)
    expected = torch.polar(torch.ones(216, 10).double(), (points_of(GRID) + by) @ frequencies)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


def test_columns_that_are_no_geometric_sequence_are_refused() -> None:
    theta = torch.tensor([0.3, 3.1, 0.2, 2.9, 0.5], dtype=torch.float64)
    table = torch.polar(torch.ones(54, 5).double(), points_of((1, 6, 9))[:, 2:] * theta)
    with pytest.raises(DitAttnError, match="along w: the columns of the rotary tables are not regular"):
        measure_grid(table.real, table.imag, resolved(visual_span("image", (1, 6, 9))))


def test_references_at_unknown_places_are_shifted_and_not_scaled() -> None:
    tokens = resolved(visual_span("video", GRID), Span("reference", None), length=4 * 6 * 9 + 7)
    table = PLAIN.table(torch.cat([points_of(GRID), torch.zeros(7, 3).double()]))
    moved(table, tokens, torch.float32, PositionMap(offset=(0, 1, 0)))
    with pytest.raises(DitAttnError, match="cannot be scaled: where the model places its reference tokens is unknown"):
        moved(table, tokens, torch.float32, PositionMap(scale=(1, 0.5, 1)))
    moved(table, tokens, torch.float32, PositionMap(scale=(1, 0.5, 1), region=slice(0, 216)))


def test_a_large_table_is_turned_in_parts() -> None:
    tokens, points = resolved(visual_span("video", GRID)), points_of(GRID)
    table = PLAIN.table(points)
    delta = torch.rand(216, 3, generator=torch.Generator().manual_seed(0)).double()
    grid = measure_grid(table.real, table.imag, tokens)
    whole = turn_tables(table.real, table.imag, grid, delta)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dit_attn.processors.core.rotary._CHUNK", 100)
        parts = turn_tables(table.real, table.imag, grid, delta)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts))
    assert isinstance(grid, RotaryGrid) and math.isclose(float(grid.frequencies.max()), 1.0, rel_tol=1e-6)
