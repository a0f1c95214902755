"""From measurements to densities: the fit keeps its sums, the budget is kept, and the choice is the best there is."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_attn import BlockSparse, DitAttnError
from dit_attn.pipelines.calibrate import allocation
from dit_attn.pipelines.calibrate.allocation import CostModel
from dit_attn.pipelines.calibrate.sensitivity import CalibrationPlan, make_plan
from dit_attn.pipelines.measurement_log import MeasurementLog

DENSITIES = (0.5, 0.25, 0.125)
TOKENS, BLOCK = 1024, 32
METHOD = BlockSparse(density=0.25, q_block=BLOCK, kv_block=BLOCK, dense_steps=0.25, dense_layers=(-1,))
seeds = st.integers(0, 2**32 - 1)


def random_model(seed: int, shape: tuple[int, int] = (2, 2), options: int = 4, steps: int = 4) -> CostModel:
    """Errors that fall with density as they like, not always convexly."""
    draw = np.random.default_rng(seed)
    densities = np.append(np.sort(draw.uniform(0.05, 0.9, options - 1)), 1.0)
    falls = np.sort(draw.lognormal(-4.0, 2.0, (options - 1, *shape)), 0)[::-1]
    error2 = np.concatenate([falls, np.zeros((1, *shape))])
    weight = draw.uniform(0.5, 1.5, shape)
    cost = densities[:, None, None] * (weight / weight.sum())
    return CostModel(densities, error2, cost, steps)


def every_choice(model: CostModel) -> list[tuple[float, float, np.ndarray]]:
    """(error^2, cost, densities) of everything that can be chosen."""
    shape = model.cost.shape[1:]
    out = []
    for picks in itertools.product(range(len(model.densities)), repeat=math.prod(shape)):
        choice = np.array(picks).reshape(shape)
        error2, cost = (
            float(np.take_along_axis(values, choice[None], 0).sum()) for values in (model.error2, model.cost)
        )
        out.append((error2, cost, model.densities[choice]))
    return out


def planted(
    sensitive: tuple[float, ...], steps: int = 8, parts: int = 2, scale: float = 0.1
) -> tuple[MeasurementLog, CalibrationPlan]:
    """Measurements of a model whose cells have these shares of the error, which falls with the square of density."""
    plan = make_plan(METHOD, parts=parts, densities=DENSITIES, steps=steps)
    shares = np.outer(np.linspace(1.0, 2.0, parts), sensitive)
    shares /= shares.sum()
    fall = [(plan.density / density) ** 4 for density in plan.densities]
    log = MeasurementLog()
    log.rows["local/a"] = {
        "error2": [(0.01 * factor * np.ones(shares.shape)).tolist() for factor in fall],
        "cost": [(density * np.ones(shares.shape)).tolist() for density in plan.densities],
        "calls": (steps / parts * np.ones(shares.shape)).tolist(),
        "steps": steps,
        "tokens": TOKENS,
    }
    log.rows["all/a"] = scale
    log.rows |= {f"layer/a/{n}": scale * math.sqrt(value) for n, value in enumerate(shares.sum(0))}
    log.rows |= {f"part/a/{n}": scale * math.sqrt(value) for n, value in enumerate(shares.sum(1))}
    return log, plan


@given(seeds)
@settings(max_examples=30, deadline=None)
def test_fitted_cells_have_the_sums_that_were_asked_for(seed: int) -> None:
    draw = np.random.default_rng(seed)
    parts, layers = draw.dirichlet(np.ones(4)) + 1e-4, draw.dirichlet(np.ones(6)) + 1e-4
    parts, layers = parts / parts.sum(), layers / layers.sum()
    cells = draw.lognormal(0.0, 1.0, (4, 6))
    found = allocation.fit_margins(cells, layers, parts)
    assert found.sum(1) == pytest.approx(parts, rel=1e-6) and found.sum(0) == pytest.approx(layers, rel=1e-6)
    odds = lambda x: x[0, 0] * x[1, 1] / (x[0, 1] * x[1, 0])  # noqa: E731
    assert odds(found) == pytest.approx(odds(cells), rel=1e-6)  # what a fit by rows and columns leaves alone


@given(seeds, st.floats(0.0, 1.0))
@settings(max_examples=40, deadline=None)
def test_the_budget_of_cost_is_kept(seed: int, where: float) -> None:
    model = random_model(seed, (3, 4), 6)
    floor = float(model.cost.min(0).sum())
    budget = floor + where * (1.0 - floor)
    found = allocation.expect(model, allocation.allocate(model, cost=budget))
    assert found[1] <= budget + 1e-6
    assert found[0] <= allocation.expect(model, np.full((3, 4), model.densities[0]))[0] + 1e-12


@given(seeds, st.floats(0.0, 1.5))
@settings(max_examples=40, deadline=None)
def test_the_budget_of_error_is_kept(seed: int, where: float) -> None:
    model = random_model(seed, (3, 4), 6)
    worst = math.sqrt(model.error2[0].sum())
    densities = allocation.allocate(model, error=where * worst)
    assert allocation.expect(model, densities)[0] <= where * worst + 1e-9
    if where >= 1.0:
        assert (densities == model.densities[0]).all()


@given(seeds, st.floats(0.0, 1.0))
@settings(max_examples=25, deadline=None)
def test_nothing_is_better_at_the_cost_that_is_spent(seed: int, where: float) -> None:
    model = random_model(seed)
    reach = allocation.allocate(model, error=where * math.sqrt(model.error2[0].sum()))  # where a step of the hull ends
    error, cost = allocation.expect(model, reach)
    best = min(error2 for error2, paid, _ in every_choice(model) if paid <= cost + 1e-9)
    assert error**2 == pytest.approx(best, rel=1e-9, abs=1e-15)


@given(seeds)
@settings(max_examples=25, deadline=None)
def test_the_least_budget_has_the_largest_error_and_dense_has_none(seed: int) -> None:
    model = random_model(seed, (2, 3), 5)
    floor = float(model.cost.min(0).sum())
    errors = [
        allocation.expect(model, allocation.allocate(model, cost=budget))[0] for budget in np.linspace(floor, 1.0, 12)
    ]
    assert errors[-1] == 0.0
    assert errors[0] == max(errors)


def test_a_cost_below_the_lowest_density_is_refused() -> None:
    model = random_model(0)
    with pytest.raises(DitAttnError, match=r"--cost 0\.001 is below .* or lower --densities"):
        allocation.allocate(model, cost=0.001)


def test_uneven_layers_are_found_and_beat_one_density_at_equal_cost() -> None:
    log, plan = planted((100.0, 1.0, 1.0, 10.0))
    model = allocation.fit_cost_model(log, ["a"], plan)
    cost = model.expect_uniform(plan.method, plan.density, plan.parts)[1]
    densities = allocation.allocate(model, cost=cost)
    assert densities[:, 0].min() > densities[:, 3].max() > densities[:, 1].max()
    assert densities[1, 0] >= densities[0, 0]  # the later part weighs twice
    ours = allocation.expect(model, densities)
    uniform = allocation.uniform_at_cost(model, plan, ours[1])
    theirs = model.expect_uniform(uniform, uniform.density, plan.parts)
    assert theirs[1] >= ours[1] - 1e-6 and ours[0] < 0.7 * theirs[0]


def test_the_cost_model_has_what_was_measured_and_says_dense_is_exact() -> None:
    log, plan = planted((3.0, 1.0))
    model = allocation.fit_cost_model(log, ["a"], plan)
    where = int(np.searchsorted(model.densities, plan.density - 1e-9))
    assert model.densities[where] == plan.density and model.densities[-1] == 1.0
    assert math.sqrt(model.error2[where].sum()) == pytest.approx(0.1, rel=1e-6)
    assert model.error2[where].sum(0) == pytest.approx([0.0075, 0.0025], rel=1e-6)
    assert model.cost[where].sum() == pytest.approx(plan.density) and model.cost[-1].sum() == pytest.approx(1.0)
    assert not model.error2[-1].any()
    steep = int(np.searchsorted(model.densities, 0.125 - 1e-9))
    assert model.error2[steep] == pytest.approx(16.0 * model.error2[where], rel=1e-6)
    blocks = model.densities * TOKENS / BLOCK
    assert blocks == pytest.approx(np.round(blocks)) and (np.diff(model.densities) > 0).all()


def test_one_density_for_all_counts_its_dense_steps_and_layers() -> None:
    log, plan = planted((1.0, 1.0, 1.0, 1.0))
    model = allocation.fit_cost_model(log, ["a"], plan)
    error, cost = model.expect_uniform(METHOD, 0.25, plan.parts)
    assert cost == pytest.approx(1.0 - 0.75 * (6 / 8) * (3 / 4))
    bare: Any = dataclasses.replace(METHOD, dense_steps=0, dense_layers=())
    assert model.expect_uniform(bare, 0.25, plan.parts) == pytest.approx((0.1, 0.25))
    assert error < 0.1


@given(seeds, st.floats(0.2, 1.0))
@settings(max_examples=25, deadline=None)
def test_the_uniform_baseline_never_costs_less(seed: int, cost: float) -> None:
    draw = np.random.default_rng(seed)
    log, plan = planted(tuple(draw.lognormal(0.0, 1.0, 4)))
    model = allocation.fit_cost_model(log, ["a"], plan)
    uniform = allocation.uniform_at_cost(model, plan, cost)
    assert model.expect_uniform(uniform, uniform.density, plan.parts)[1] >= cost - 1e-6
    assert dataclasses.replace(uniform, density=plan.density) == plan.method


def test_errors_of_items_are_averaged_as_logarithms() -> None:
    log, plan = planted((1.0, 1.0), scale=0.1)
    other, _ = planted((1.0, 1.0), scale=0.4)
    log.rows |= {key.replace("/a", "/b"): value for key, value in other.rows.items()}
    model = allocation.fit_cost_model(log, ["a", "b"], plan)
    error, _ = allocation.expect(model, np.full((2, 2), 0.25))
    assert error == pytest.approx(0.2, rel=1e-6)


# -- heads -------------------------------------------------------------------------------------------------------------


def planted_heads(shares: tuple[float, ...]) -> tuple[MeasurementLog, CalibrationPlan]:
    """The planted measurements, with the error of every layer divided over its heads."""
    log, plan = planted((1.0, 3.0, 2.0))
    row = log.rows["heads/a"] = dict(log.rows["local/a"])
    row["head_error2"] = (np.asarray(row["error2"])[..., None] * np.array(shares)).tolist()
    row["head_cost"] = np.repeat(np.asarray(row["cost"])[..., None], len(shares), -1).tolist()
    return log, dataclasses.replace(plan, by_head=True)


def test_the_heads_of_a_layer_share_its_error_and_cost() -> None:
    log, plan = planted_heads((0.7, 0.2, 0.1))
    heads, layers = (allocation.fit_cost_model(log, ["a"], plan, by_head) for by_head in (None, False))
    assert (heads.heads, layers.heads) == (3, 1) and heads.error2.shape == (len(layers.densities), 2, 9)
    for name in ("error2", "cost"):
        by_layer = getattr(heads, name).reshape(-1, 2, 3, 3)
        assert by_layer.sum(-1) == pytest.approx(getattr(layers, name))
    shares = heads.error2.reshape(-1, 2, 3, 3)[0, 1, 2] / layers.error2[0, 1, 2]
    assert shares == pytest.approx([0.7, 0.2, 0.1])
    for density in (layers.densities[0], 0.25, 1.0):
        for parts in (1, 2):
            expected = layers.expect_uniform(METHOD, density, parts)  # the last layer is dense
            assert heads.expect_uniform(METHOD, density, parts) == pytest.approx(expected)


def test_attention_goes_to_the_heads_that_err_and_costs_the_same() -> None:
    log, plan = planted_heads((0.9, 0.05, 0.05))
    heads, layers = (allocation.fit_cost_model(log, ["a"], plan, by_head) for by_head in (True, False))
    cost = layers.expect_uniform(METHOD, 0.25, 2)[1]
    chosen, by_layer = (allocation.allocate(model, cost=cost) for model in (heads, layers))
    found, other = allocation.expect(heads, chosen), allocation.expect(layers, by_layer)
    assert found[1] <= cost + 1e-9 and other[1] <= cost + 1e-9 and found[0] < 0.9 * other[0]
    rows = chosen.reshape(2, 3, 3)
    assert (rows[..., 0] > rows[..., 1]).all() and rows[..., 1] == pytest.approx(rows[..., 2], abs=0.1)
