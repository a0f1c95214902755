"""The measurements of a calibration: what they are, that none is made twice, and which plans are refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import dit_attn
from dit_attn import BlockSparse, DitAttnError, RectifiedSpaAttn, ReTtention, SoftPAG
from dit_attn.pipelines.calibrate import sensitivity
from dit_attn.pipelines.calibrate.runs import RequestedRuns, measure_items, sparse_runs
from dit_attn.pipelines.calibrate.sensitivity import make_plan
from dit_attn.pipelines.measurement_log import MeasurementLog
from dit_attn.pipelines.run import answered_here
from tests._support import tiny_run
from tests._support.tiny_run import LAYERS, METHOD, STEPS, CountedRuns

PLAN = make_plan(METHOD, parts=2, densities=(0.5, 0.125), steps=STEPS)


def measure(pipe: Any, runs: Any, item: str, plan: Any, log: MeasurementLog) -> None:
    """Measure an item in this process."""
    measure_items([item], plan, LAYERS, log, answered_here(RequestedRuns(pipe, runs, plan)))


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny_run.load()


@pytest.fixture(scope="module")
def measured(pipe: Any) -> tuple[MeasurementLog, CountedRuns]:
    """One item, measured whole."""
    log, runs = MeasurementLog(), CountedRuns(pipe)
    measure(pipe, runs, "red", PLAN, log)
    return log, runs


def test_an_item_is_run_dense_once_and_once_for_every_layer_and_part(
    measured: tuple[MeasurementLog, CountedRuns],
) -> None:
    log, runs = measured
    keys = {"local/red", "all/red", *(f"layer/red/{n}" for n in range(LAYERS)), "part/red/0", "part/red/1"}
    assert set(log.rows) == keys == {"local/red", *sparse_runs("red", PLAN, LAYERS)}
    assert runs.made == {"red": len(keys)}  # the dense run is that of the local measurement


def test_local_errors_fall_and_costs_rise_with_density(measured: tuple[MeasurementLog, CountedRuns]) -> None:
    local = measured[0].rows["local/red"]
    error2, cost, calls = (np.asarray(local[name]) for name in ("error2", "cost", "calls"))
    assert error2.shape == cost.shape == (3, 2, LAYERS) and calls.shape == (2, LAYERS)
    assert (np.diff(error2, axis=0) > 0).all() and (np.diff(cost, axis=0) < 0).all()  # densities descend
    assert cost == pytest.approx(np.broadcast_to(np.array(PLAN.densities)[:, None, None], cost.shape))
    assert (calls == calls[0, 0]).all() and (local["steps"], local["tokens"]) == (STEPS, 256)


def test_heads_are_told_apart_on_request(pipe: Any, measured: tuple[MeasurementLog, CountedRuns]) -> None:
    plan = make_plan(METHOD, parts=2, densities=(0.5, 0.125), steps=STEPS, by_head=True)
    log = MeasurementLog()
    log.rows |= measured[0].rows
    runs = CountedRuns(pipe)
    measure(pipe, runs, "red", plan, log)
    assert runs.made == {"red": 1}  # the runs with one layer or part sparse are the same
    found, layer = log.rows["heads/red"], log.rows["local/red"]
    error2, cost = np.asarray(found["head_error2"]), np.asarray(found["head_cost"])
    assert error2.shape == cost.shape == (3, 2, LAYERS, 2)
    assert error2.sum(-1) == pytest.approx(np.asarray(layer["error2"]), rel=1e-4)
    assert cost.mean(-1) == pytest.approx(np.asarray(layer["cost"])) and found["error2"] == layer["error2"]


def test_rows_of_heads_make_a_table() -> None:
    densities = np.arange(1, 9).reshape(2, 2, 2) / 8
    assert PLAN.with_densities(densities).densities == ((0.125, 0.25), (0.375, 0.5), (0.625, 0.75), (0.875, 1.0))
    with pytest.raises(DitAttnError, match="density has a number for each head"):
        make_plan(BlockSparse(density=(0.25, 0.5)))


def test_effects_at_the_end_are_those_of_the_tables_they_stand_for(pipe: Any, measured: Any) -> None:
    log, _ = measured
    runs = CountedRuns(pipe)
    dense = sensitivity.dense_latents(runs, "red")
    alone = np.ones((2, LAYERS))
    alone[:, 3] = PLAN.density
    found = sensitivity.run_sparse(pipe, runs, "red", PLAN.with_densities(alone), dense)
    assert found["error"] == pytest.approx(log.rows["layer/red/3"], rel=1e-5)
    assert found["cost"] == pytest.approx(1 - 0.75 / LAYERS)
    effects = [value for key, value in log.rows.items() if key.startswith(("layer", "part", "all"))]
    assert all(0 < value < sensitivity.MAX_ERROR for value in effects)
    whole = sensitivity.run_sparse(pipe, runs, "red", PLAN.with_density(1.0), dense)
    assert whole == {"error": 0.0, "cost": 1.0}


def test_a_later_call_measures_nothing_twice(pipe: Any, measured: tuple[MeasurementLog, CountedRuns]) -> None:
    runs = CountedRuns(pipe)
    measure(pipe, runs, "red", PLAN, measured[0])
    assert not runs.made
    part = MeasurementLog()
    part.rows = {key: value for key, value in measured[0].rows.items() if key not in ("layer/red/2", "all/red")}
    measure(pipe, runs, "red", PLAN, part)
    assert runs.made == {"red": 3}  # dense, and the two that were missing
    assert part.rows.keys() == measured[0].rows.keys()
    assert all(part.rows[key] == pytest.approx(measured[0].rows[key], rel=1e-5) for key in ("layer/red/2", "all/red"))


def test_ranking_by_pieces_counts_as_cost(pipe: Any) -> None:
    pieces = RectifiedSpaAttn(density=0.25, q_block=32, kv_block=32, dense_steps=0, probe=8)
    runs = CountedRuns(pipe)
    dense = sensitivity.dense_latents(runs, "red")
    costs = [
        sensitivity.run_sparse(pipe, runs, "red", method, dense)["cost"]
        for method in (pieces, RectifiedSpaAttn(density=0.25, q_block=32, kv_block=32, dense_steps=0))
    ]
    assert costs[0] - costs[1] == pytest.approx(1.5 / 64, abs=1e-6)


def test_a_result_that_fell_apart_has_the_largest_error(pipe: Any) -> None:
    nan = lambda item: torch.full((1, 4, 8, 8), float("nan"))  # noqa: E731
    found = sensitivity.run_sparse(pipe, nan, "red", METHOD, torch.ones(1, 4, 8, 8))
    assert found["error"] == sensitivity.MAX_ERROR
    with pytest.raises(DitAttnError, match="dense run of red is NaN"):
        sensitivity.dense_latents(nan, "red")


def test_a_run_without_a_call_to_touch_is_refused(pipe: Any) -> None:
    small = {**tiny_run.CALL, "height": 32, "width": 32}

    def runs(item: str) -> torch.Tensor:
        latents: torch.Tensor = pipe("a circle", output_type="latent", **small).images
        return latents

    with pytest.raises(DitAttnError, match="no attention call of this run can be made sparse"):
        measure(pipe, runs, "red", PLAN, MeasurementLog())


def test_looking_too_seldom_is_refused(pipe: Any) -> None:
    plan = make_plan(METHOD, parts=2, densities=(0.5,), step_stride=8, steps=STEPS)
    with pytest.raises(DitAttnError, match="smaller --every or fewer --parts"):
        measure(pipe, CountedRuns(pipe), "red", plan, MeasurementLog())


def test_a_method_that_was_on_the_pipeline_is_disabled(pipe: Any) -> None:
    dit_attn.enable(pipe, METHOD)
    log, runs = MeasurementLog(), CountedRuns(pipe)
    log.rows = dict.fromkeys(sparse_runs("blue", PLAN, LAYERS), 0.1)
    measure(pipe, runs, "blue", PLAN, log)
    with pytest.raises(DitAttnError, match="no method is enabled"):
        dit_attn.summary(pipe)


# -- plans -------------------------------------------------------------------------------------------------------------


def test_a_plan_measures_the_density_of_its_method_too() -> None:
    plan = make_plan(METHOD, densities=(0.125, 0.5), steps=20)
    assert plan.densities == (0.5, 0.25, 0.125) and plan.density == 0.25 and (plan.parts, plan.step_stride) == (10, 2)
    assert make_plan(METHOD, steps=4).parts == 4
    assert make_plan(ReTtention(density=0.25), steps=20).parts == 1


def test_densities_by_layer_and_part_replace_the_dense_exceptions() -> None:
    method = BlockSparse(density=0.25, dense_steps=0.1, dense_layers=(0,), max_error=0.5)
    unrestricted = make_plan(method, parts=2).unrestricted
    assert (unrestricted.dense_steps, unrestricted.dense_layers, unrestricted.max_error) == (0, (), None)
    assert make_plan(method, parts=1).unrestricted.dense_steps == 0.1  # one part cannot say which steps are dense


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: make_plan(SoftPAG()), "softpag has no density to calibrate"),
        (lambda: make_plan(BlockSparse(top_p=0.9)), "no top_p"),
        (lambda: make_plan(BlockSparse(density=0.5, densities=(0.5,))), "densities is set"),
        (lambda: make_plan(BlockSparse(density=0.5, target_error=0.1)), "target_error is set"),
        (lambda: make_plan(METHOD, densities=(0.5, 1.0)), "below 1, got 1.0"),
        (lambda: make_plan(METHOD, densities=(0.25,)), "one density to measure is not enough"),
        (lambda: make_plan(ReTtention(density=0.25), parts=2), "parts must be 1, got 2"),
        (lambda: make_plan(METHOD, parts=9, steps=4), "4 steps has no 9 parts"),
    ],
)
def test_plans_that_make_no_sense_are_refused(make: Any, words: str) -> None:
    with pytest.raises(DitAttnError, match=words):
        make()
