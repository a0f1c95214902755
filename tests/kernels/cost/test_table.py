"""The ratio to expect of a call: measured points are met, it is monotone in between, what is unknown gains nothing."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dit_attn.kernels.cost import Cost, CostTable, Machine

HERE = Machine("cpu", "a processor, 2 cores", 2, "2.13.0", 1)
POINTS = {1024: (0.4, 0.8, 1.2), 4096: (0.2, 0.4, 0.7), 16384: (0.1, 0.3, 0.6)}  # of densities 0.125, 0.25, 0.5


def table(points: dict[int, tuple[float, ...]] = POINTS, sizes: tuple[int, ...] = (64,)) -> CostTable:
    costs = (
        Cost(size, "float32", tokens, density, ratio * (1 if size == 64 else 1.25), "gather")
        for size in sizes
        for tokens, ratios in points.items()
        for density, ratio in zip((0.125, 0.25, 0.5), ratios)
    )
    return CostTable(HERE, tuple(costs))


def test_measured_points_are_met_and_the_ends_go_on_level() -> None:
    found = table()
    for tokens, ratios in POINTS.items():
        for density, ratio in zip((0.125, 0.25, 0.5), ratios):
            assert found.expected(tokens, 64, torch.float32, density) == pytest.approx(ratio)
    assert found.expected(10**6, 64, "float32", 0.25) == found.expected(16384, 64, "float32", 0.25)
    assert found.expected(4096, 64, "float32", 0.01) == found.expected(4096, 64, "float32", 0.125)
    assert found.expected(2048, 64, "float32", 0.25) == pytest.approx(0.6)  # half way in log tokens
    assert found.expected(4096, 64, "float32", 1.0) == 1.0


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((1023, 64, "float32"), "1,023 tokens are fewer than the fewest measured, 1,024"),
        ((4096, 63, "float32"), "heads of 63 are smaller than the smallest measured, 64"),
        ((4096, 64, torch.float16), "float16 was not measured"),
    ],
)
def test_no_gain_is_assumed_beyond_the_edges_of_the_table(shape: tuple[int, int, str], words: str) -> None:
    assert table().unknown(*shape) == words and table().expected(*shape, 0.125) == 1.0
    assert table().unknown(1024, 64, "float32") is None


def test_an_empty_table_expects_no_gain() -> None:
    found = CostTable(HERE, (), "guess")
    assert found.expected(10**6, 128, "float32", 0.01) == 1.0 and "nothing is known" in str(found.unknown(1, 1, "x"))


def test_between_two_head_sizes_the_slower_one_counts_and_both_must_reach_the_tokens() -> None:
    found = table(sizes=(64, 128))
    assert found.expected(4096, 96, "float32", 0.25) == found.expected(4096, 128, "float32", 0.25) == 0.5
    assert found.expected(4096, 256, "float32", 0.25) == 0.5
    late = CostTable(HERE, tuple(c for c in found.costs if c.head_dim == 64 or c.tokens > 1024))
    assert late.unknown(1024, 64, "float32") is None and "4,096" in str(late.unknown(1024, 96, "float32"))


@given(
    ratios=st.lists(st.floats(0.01, 3.0), min_size=9, max_size=9),
    tokens=st.lists(st.integers(1024, 40000), min_size=2, max_size=2),
    densities=st.lists(st.floats(0.01, 1.0), min_size=2, max_size=2),
)
def test_expectations_never_fall_with_density_or_rise_with_tokens(
    ratios: list[float], tokens: list[int], densities: list[float]
) -> None:
    found = table({size: tuple(ratios[3 * i : 3 * i + 3]) for i, size in enumerate(POINTS)})
    (few, many), (thin, thick) = sorted(tokens), sorted(densities)
    at = {(s, d): found.expected(s, 64, "float32", d) for s in (few, many) for d in (thin, thick)}
    slack = 1e-9
    assert at[few, thin] <= at[few, thick] + slack and at[many, thin] <= at[many, thick] + slack
    assert at[many, thin] <= at[few, thin] + slack and at[many, thick] <= at[few, thick] + slack
    worst = max(ratio for i, ratio in enumerate(ratios) if i % 3 == 0)
    assert found.expected(1024, 64, "float32", 0.125) == pytest.approx(worst)  # noise is read as the slower figure


def test_the_nearest_comparison_is_of_the_nearest_head_size_then_tokens_then_density() -> None:
    rows = [
        Cost(size, "bfloat16", tokens, density, 0.5, "a", ("b",))
        for size in (64, 128) for tokens in (1024, 4096) for density in (0.5, 0.125)
    ]  # fmt: skip
    alone = Cost(96, "bfloat16", 4096, 0.25, 0.5, "a")  # nothing was compared there
    found = CostTable(HERE, (alone, *rows)).nearest_comparison
    assert found(4096, 96, torch.bfloat16, 0.3) == Cost(128, "bfloat16", 4096, 0.5, 0.5, "a", ("b",))
    assert found(1500, 64, "bfloat16", 0.01) == Cost(64, "bfloat16", 1024, 0.125, 0.5, "a", ("b",))
    assert found(4096, 96, torch.float16, 0.3) is None and table().nearest_comparison(1024, 64, "float32", 0.5) is None


def test_a_table_round_trips_and_what_is_none_is_refused() -> None:
    found = table()
    compared = CostTable(HERE, (Cost(64, "bfloat16", 4096, 0.25, 0.5, "a", ("b", "c")),))
    assert CostTable.from_dict(json.loads(json.dumps(compared.to_dict()))) == compared
    data = json.loads(json.dumps(found.to_dict()))
    assert CostTable.from_dict(data) == found and "slower" not in data["costs"][0]
    for wrong in ({}, {"machine": 1, "costs": []}, {**data, "costs": [{**data["costs"][0], "ratio": -1}]}, []):
        with pytest.raises(ValueError, match="not as dit-attn writes it"):
            CostTable.from_dict(wrong)
    assert str(found) == "measured on this machine: a processor, 2 cores, 2 threads, torch 2.13.0"


def test_what_every_call_takes_is_a_part_of_a_dense_one_of_its_size() -> None:
    rows = [
        Cost(size, "float32", tokens, density, 0.5, seconds=seconds)
        for size, tokens, seconds in ((64, 1024, 1e-3), (128, 1024, 2e-3), (64, 4096, 16e-3))
        for density in (0.5, 0.25)
    ]
    found = CostTable(HERE, tuple(rows), fixed=4e-3)
    assert CostTable.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    assert found.fixed_part(1024, 64, torch.float32, 2) == pytest.approx(2.0)
    assert found.fixed_part(1024, 128, "float32", 8) == pytest.approx(0.25)
    assert found.fixed_part(16384, 64, "float32", 1) == pytest.approx(4e-3 / (16 * 16e-3))
    assert found.fixed_part(1024, 64, "bfloat16", 2) == table().fixed_part(1024, 64, "float32", 2) == 0.0
    for broken in ({"fixed_seconds": -1.0}, {"fixed_seconds": float("inf")}, {"fixed_seconds": None}):
        with pytest.raises(ValueError, match="not as dit-attn writes it"):
            CostTable.from_dict({**found.to_dict(), **broken})
