"""Maps of positions: what they move, by how much, one after another, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_attn import DitAttnError
from dit_attn.processors.core.clock import Clock
from dit_attn.processors.core.layer import Layer
from dit_attn.processors.core.positions import PositionMap, PositionSite, band_weights, displacement
from dit_attn.processors.core.tokens import visual_span

COUNT = 12
GRID = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float64) for n in (1, 3, 4)))
triples = st.tuples(*[st.floats(-3, 3)] * 3)
regions = st.one_of(
    st.none(),
    st.builds(slice, st.integers(0, COUNT), st.integers(0, COUNT)),
    st.lists(st.booleans(), min_size=COUNT, max_size=COUNT).map(torch.tensor),
)
maps = st.builds(PositionMap, scale=triples, offset=triples, origin=triples, region=regions)


def one_by_one(items: list[PositionMap], points: torch.Tensor) -> torch.Tensor:
    """The equation, token by token."""
    points = points.clone()
    for item in items:
        chosen = torch.arange(COUNT) if item.region is None else torch.arange(COUNT)[item.region]
        for token in chosen.tolist():
            for axis in range(3):
                origin = item.origin[axis]
                points[token, axis] = origin + item.scale[axis] * (points[token, axis] - origin) + item.offset[axis]
    return points


@settings(deadline=None, max_examples=60)
@given(items=st.lists(maps, max_size=3))
def test_maps_move_their_tokens_one_after_another(items: list[PositionMap]) -> None:
    moved = displacement(items, GRID)
    torch.testing.assert_close(GRID + moved, one_by_one(items, GRID), atol=1e-10, rtol=1e-10)


def test_what_no_map_reaches_does_not_move_by_a_bit() -> None:
    points = GRID / 3 + 0.1
    items = [PositionMap(offset=(0.3, 0, 0.1), region=slice(2, 5)), PositionMap(scale=(1, 1, 0.7), region=slice(4, 6))]
    moved = displacement(items, points)
    assert (moved[[0, 1, 6, 11]] == 0).all() and (moved[:, 1] == 0).all()
    assert moved[2].tolist() == [0.3, 0, 0.1] and moved[5, 0] == 0 and moved[4, 2] != 0.1


def test_the_origin_of_a_scale_stays_and_an_origin_alone_moves_nothing() -> None:
    moved = displacement([PositionMap(scale=(1, 0.5, 0.5), origin=(0, 2, 1))], GRID)
    assert moved[2 * 4 + 1].tolist() == [0, 0, 0] and moved[0].tolist() == [0, 1, 0.5]
    assert not displacement([PositionMap(origin=(0.1, 0.2, 0.3))], GRID).any()
    assert not PositionMap(origin=(0.1, 0.2, 0.3)).moves


def test_a_token_at_an_unknown_place_can_be_shifted_and_not_scaled() -> None:
    points = torch.full((COUNT, 3), math.nan, dtype=torch.float64)
    assert displacement([PositionMap(offset=(0, 1, 2))], points)[3].tolist() == [0, 1, 2]
    assert displacement([PositionMap(scale=(1, 2, 1))], points)[:, 1].isnan().all()


def moved_angles(item: PositionMap, theta: torch.Tensor) -> torch.Tensor:
    """Angles of the tokens of ``GRID`` after a map, (Sv, K) fp64, as the tables are turned."""
    weights = band_weights([item], theta)
    weights = torch.ones_like(theta) if weights is None else weights
    return GRID @ theta + displacement([item], GRID) @ (theta * weights)


def test_slow_frequencies_are_scaled_in_full_and_the_fastest_not_at_all() -> None:
    columns, base, factor = 6, 10_000.0, 2.5
    theta = torch.zeros(3, 3 * columns, dtype=torch.float64)
    speeds = base ** (-torch.arange(columns, dtype=torch.float64) / columns)
    for axis in range(3):
        theta[axis, axis * columns : (axis + 1) * columns] = speeds
    scale = (1.0, 1 / factor, 1 / factor)
    # NTK: another base, such that the slowest column is interpolated
    wider = base * factor ** (columns / (columns - 1))
    ntk = theta.clone()
    for axis in (1, 2):
        exponents = -torch.arange(columns, dtype=torch.float64) / columns
        ntk[axis, axis * columns : (axis + 1) * columns] = wider**exponents
    torch.testing.assert_close(moved_angles(PositionMap(scale=scale, bands="ntk"), theta), GRID @ ntk)
    # YaRN: by turns over the native length
    native = (4.0, 60.0, 300.0)
    yarn = theta.clone()
    for axis in (1, 2):
        turns = native[axis] * theta[axis] / (2 * math.pi)
        ramp = ((turns - 1) / 31).clamp(0, 1)
        yarn[axis] = theta[axis] * ((1 - ramp) / factor + ramp)
    torch.testing.assert_close(moved_angles(PositionMap(scale=scale, bands="yarn", native=native), theta), GRID @ yarn)
    plain = PositionMap(scale=scale)
    torch.testing.assert_close(moved_angles(plain, theta), GRID * torch.tensor(scale, dtype=torch.float64) @ theta)
    assert band_weights([plain, plain], theta) is None and "(ntk)" in str(PositionMap(scale=scale, bands="ntk"))
    assert not plain.same(PositionMap(scale=scale, bands="ntk"))
    with pytest.raises(DitAttnError, match="by frequency and moved at once"):
        band_weights([plain, PositionMap(scale=scale, bands="yarn")], theta)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bands": "slow"}, "unknown bands of a PositionMap 'slow'"),
        ({"scale": (1, 1)}, r"scale of a PositionMap must be three finite numbers \(t, h, w\), got \(1, 1\)"),
        ({"scale": 2.0}, "scale of a PositionMap must be three"),
        ({"offset": (0, math.nan, 0)}, "offset of a PositionMap must be three finite"),
        ({"origin": (0, "1", 0)}, "origin of a PositionMap must be three"),
        ({"region": [1, 2]}, r"must be a slice or \(Sv,\) bool, got \[1, 2\]"),
        ({"region": torch.ones(2, 4, dtype=torch.bool)}, r"\(Sv,\) bool, the same for all batch rows, got \(2, 4\)"),
        ({"region": torch.ones(4)}, r"got \(4,\) torch.float32"),
    ],
)
def test_a_map_that_makes_no_sense_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(DitAttnError, match=message):
        PositionMap(**settings)


def test_a_region_of_another_length_is_refused() -> None:
    with pytest.raises(DitAttnError, match="a region has 5 tokens; the sequence has 12 visual ones"):
        displacement([PositionMap(offset=(0, 1, 0), region=torch.ones(5, dtype=torch.bool))], GRID)


def test_maps_are_compared_by_what_they_move() -> None:
    region = torch.tensor([True, False])
    first = PositionMap(offset=(0, 1, 0), region=region)
    assert first.same(PositionMap(offset=(0.0, 1.0, 0.0), region=region.clone()))
    assert not first.same(PositionMap(offset=(0, 1, 0), region=~region))
    assert not first.same(PositionMap(offset=(0, 1, 0)))
    assert not first.same(PositionMap(offset=(0, 2, 0), region=region))
    assert PositionMap(region=slice(3)).same(PositionMap(region=slice(None, 3)))


def test_a_site_knows_its_visual_tokens() -> None:
    spans = (visual_span("reference", (1, 2, 2)), visual_span("video", (2, 3, 4)))
    site = PositionSite(Layer("attn", 0), spans, Clock())
    assert site.num_tokens == 28 and site.grid == (2, 3, 4)
    assert PositionSite(Layer("attn", 0), (), Clock()).grid is None


def test_a_map_is_told_by_the_axes_it_changes() -> None:
    assert str(PositionMap(scale=(1, 0.5, 0.5))) == "h x0.5, w x0.5"
    assert str(PositionMap(scale=(1, 2, 1), offset=(-1.5, 3, 0), region=slice(4))) == "t -1.5, h x2 +3 in a region"
    assert str(PositionMap()) == "nothing"
