"""Every call of dense runs is repeated by every method, and errors and costs are averaged over runs."""

from __future__ import annotations

import math

import pytest

from dit_attn import BlockSparse, RectifiedSpaAttn, ReTtention, models
from dit_attn.pipelines.benchmark import operator_error
from dit_attn.pipelines.benchmark.operator_error import OperatorProbe

GRID = (4, 8, 8)


def options(block: int = 16) -> dict[str, int]:
    return {"q_block": block, "kv_block": block, "dense_steps": 0}


@pytest.fixture(scope="module")
def measured() -> dict[str, OperatorProbe]:
    """Two runs of synthetic fields through a few methods."""
    probes = {
        "plain": OperatorProbe("plain", BlockSparse(density=0.25, **options()), by_head=True),
        "merge": OperatorProbe("merge", RectifiedSpaAttn(density=0.25, pooled_block=8, **options())),
        "thin": OperatorProbe("thin", RectifiedSpaAttn(density=0.07, pooled_block=8, **options())),
        "rest": OperatorProbe("rest", ReTtention(density=0.25, stagger=False, **options())),
        "rare": OperatorProbe("rare", BlockSparse(density=0.25, **options()), step_stride=3),
    }
    about = operator_error.measure_operators(operator_error.synthetic_source(GRID, steps=6), 2, list(probes.values()))
    assert about["calls"] == 2 * 6 * 6 and about["tokens"] == [256]
    return probes


def test_stateless_methods_are_measured_at_every_call_or_at_one_step_of_n(measured: dict[str, OperatorProbe]) -> None:
    assert len(measured["plain"].calls) == 72
    assert {call["step"] for call in measured["rare"].calls} == {1, 4}
    assert {call["run"] for call in measured["rare"].calls} == {0, 1}
    same = [call["l2"] for call in measured["plain"].calls if call["step"] in (1, 4)]
    assert same == [call["l2"] for call in measured["rare"].calls]


def test_pooled_keys_are_part_of_the_cost_and_lower_the_error(measured: dict[str, OperatorProbe]) -> None:
    plain, merge, thin = (operator_error.probe_row(measured[name]) for name in ("plain", "merge", "thin"))
    assert plain["cost"] == pytest.approx(0.25) and merge["cost"] == pytest.approx(0.25 + 1 / 8)
    assert merge["l2"]["value"] < plain["l2"]["value"] and merge["l2"]["value"] < thin["l2"]["value"]


def test_ranking_by_chunks_is_part_of_the_cost() -> None:
    assert RectifiedSpaAttn(probe=None).selection_cost == 0.0 == BlockSparse().selection_cost
    assert RectifiedSpaAttn(probe=8).selection_cost == 1.5 / 64
    assert RectifiedSpaAttn(probe=8, selector="mass").selection_cost == 0.5 / 64
    probe = OperatorProbe("chunks", RectifiedSpaAttn(density=0.25, probe=8, pooled_block=16, q_block=16, kv_block=16))
    operator_error.measure_operators(operator_error.synthetic_source((2, 8, 16), steps=1), 1, [probe])
    found = operator_error.probe_row(probe)
    assert found["cost"] == pytest.approx(0.25 + 1 / 16 + 1.5 / 64)


def test_refreshes_cost_and_do_not_flatter_the_mean_error(measured: dict[str, OperatorProbe]) -> None:
    calls = measured["rest"].calls
    exact = [call for call in calls if call["cost"] >= 1.0]
    assert {call["step"] for call in exact} == {0}  # the last step of six has nothing to refresh for
    assert max(call["l2"] for call in exact) < 1e-5
    found = operator_error.probe_row(measured["rest"])
    sparse = [call["l2"] for call in calls if call["cost"] < 1.0]
    assert min(sparse) < found["l2"]["value"] < max(sparse)
    mean_square = sum(call["l2"] ** 2 for call in calls) / len(calls)
    assert found["rms"]["value"] == pytest.approx(math.sqrt(mean_square), rel=0.05)
    assert found["cost"] == pytest.approx(sum(call["cost"] for call in calls) / len(calls))


def test_intervals_are_over_runs_and_the_source_can_be_repeated(measured: dict[str, OperatorProbe]) -> None:
    found = operator_error.probe_row(measured["plain"])["l2"]
    assert found["n"] == 2 and found["ci95"][0] <= found["value"] <= found["ci95"][1]
    again = OperatorProbe("again", BlockSparse(density=0.25, **options()))
    operator_error.measure_operators(operator_error.synthetic_source(GRID, steps=6), 1, [again])
    assert [c["l2"] for c in again.calls] == [c["l2"] for c in measured["plain"].calls if c["run"] == 0]


def test_a_pipeline_is_left_as_it_was_and_its_methods_are_disabled() -> None:
    pipe = models.load("tiny-image")
    pipe.set_progress_bar_config(disable=True)
    probe = OperatorProbe("none", RectifiedSpaAttn(density=0.25, compensation="none", **options(32)))
    call = {**models.call_defaults("tiny-image"), "num_inference_steps": 2}
    source = operator_error.pipeline_source(pipe, ["a large red circle"], call=call)
    about = operator_error.measure_operators(source, 1, [probe])
    assert about["calls"] == len(probe.calls) == 12 and 0.0 < operator_error.probe_row(probe)["rms"]["value"] < 1.0
    assert type(pipe.transformer.transformer_blocks[0].attn1.processor).__module__.startswith("diffusers")


def test_errors_of_heads_sum_to_that_of_the_layer_and_their_costs_have_its_mean(
    measured: dict[str, OperatorProbe],
) -> None:
    for result in measured["plain"].calls:
        assert sum(result["head_error2"]) == pytest.approx(result["l2"] ** 2, rel=1e-4)
        costs = result["head_cost"]
        assert len(costs) == len(result["head_error2"]) > 0
        assert sum(costs) / len(costs) == pytest.approx(result["cost"])
    assert all("head_cost" not in result for result in measured["merge"].calls)
