"""Every call of dense runs repeated by every method, and families compared at equal executed cost."""

from __future__ import annotations

import math

import pytest

from dit_attn import BlockSparse, DitAttnError, RectifiedSpaAttn, ReTtention, models
from dit_attn.pipelines.benchmark import equal_cost, operator_error
from dit_attn.pipelines.benchmark.operator_error import Probe

GRID = (4, 8, 8)


def options(block: int = 16) -> dict[str, int]:
    return {"q_block": block, "kv_block": block, "dense_steps": 0}


@pytest.fixture(scope="module")
def measured() -> dict[str, Probe]:
    """Two runs of synthetic fields through a few methods."""
    probes = {
        "plain": Probe("plain", BlockSparse(density=0.25, **options())),
        "merge": Probe("merge", RectifiedSpaAttn(density=0.25, virtual_block=8, **options())),
        "thin": Probe("thin", RectifiedSpaAttn(density=0.07, virtual_block=8, **options())),
        "rest": Probe("rest", ReTtention(density=0.25, stagger=False, **options())),
        "rare": Probe("rare", BlockSparse(density=0.25, **options()), every=3),
    }
    about = operator_error.measure(operator_error.synthetic_source(GRID, steps=6), 2, list(probes.values()))
    assert about["calls"] == 2 * 6 * 6 and about["tokens"] == [256]
    return probes


def test_stateless_methods_are_measured_at_every_call_or_at_one_step_of_n(measured: dict[str, Probe]) -> None:
    assert len(measured["plain"].calls) == 72
    assert {call["step"] for call in measured["rare"].calls} == {1, 4}
    assert {call["run"] for call in measured["rare"].calls} == {0, 1}
    same = [call["l2"] for call in measured["plain"].calls if call["step"] in (1, 4)]
    assert same == [call["l2"] for call in measured["rare"].calls]


def test_virtual_keys_are_part_of_the_cost_and_lower_the_error(measured: dict[str, Probe]) -> None:
    plain, merge, thin = (operator_error.row(measured[name]) for name in ("plain", "merge", "thin"))
    assert plain["cost"] == pytest.approx(0.25) and merge["cost"] == pytest.approx(0.25 + 1 / 8)
    assert merge["l2"]["value"] < plain["l2"]["value"] and merge["l2"]["value"] < thin["l2"]["value"]


def test_ranking_by_pieces_is_part_of_the_cost() -> None:
    assert operator_error.ranking_share(RectifiedSpaAttn(probe=None)) == operator_error.ranking_share(BlockSparse()) == 0.0
    assert operator_error.ranking_share(RectifiedSpaAttn(probe=8)) == 1.5 / 64
    assert operator_error.ranking_share(RectifiedSpaAttn(probe=8, select="mass")) == 0.5 / 64


def test_refreshes_cost_and_do_not_flatter_the_mean_error(measured: dict[str, Probe]) -> None:
    calls = measured["rest"].calls
    exact = [call for call in calls if call["cost"] >= 1.0]
    assert {call["step"] for call in exact} == {0}  # the last step of six has nothing to refresh for
    assert max(call["l2"] for call in exact) < 1e-5
    found = operator_error.row(measured["rest"])
    sparse = [call["l2"] for call in calls if call["cost"] < 1.0]
    assert min(sparse) < found["l2"]["value"] < max(sparse)
    mean_square = sum(call["l2"] ** 2 for call in calls) / len(calls)
    assert found["rms"]["value"] == pytest.approx(math.sqrt(mean_square), rel=0.05)
    assert found["cost"] == pytest.approx(sum(call["cost"] for call in calls) / len(calls))


def test_intervals_are_over_runs_and_the_source_can_be_repeated(measured: dict[str, Probe]) -> None:
    found = operator_error.row(measured["plain"])["l2"]
    assert found["n"] == 2 and found["ci95"][0] <= found["value"] <= found["ci95"][1]
    again = Probe("again", BlockSparse(density=0.25, **options()))
    operator_error.measure(operator_error.synthetic_source(GRID, steps=6), 1, [again])
    assert [c["l2"] for c in again.calls] == [c["l2"] for c in measured["plain"].calls if c["run"] == 0]


def test_a_pipeline_is_left_as_it_was_and_its_methods_are_taken_off() -> None:
    pipe = models.load("tiny-image")
    pipe.set_progress_bar_config(disable=True)
    probe = Probe("none", RectifiedSpaAttn(density=0.25, compensation="none", **options(32)))
    call = {**models.call_defaults("tiny-image"), "num_inference_steps": 2}
    about = operator_error.measure(operator_error.pipeline_source(pipe, ["a large red circle"], call=call), 1, [probe])
    assert about["calls"] == len(probe.calls) == 12 and 0.0 < operator_error.row(probe)["rms"]["value"] < 1.0
    assert type(pipe.transformer.transformer_blocks[0].attn1.processor).__module__.startswith("diffusers")


# -- equal cost --------------------------------------------------------------------------------------------------------


def rung(cost: float, error: float, runs: int = 2, spread: float = 1.0) -> Probe:
    """A probe whose calls are made up: errors grow by ``spread`` from run to run."""
    probe = Probe(f"{cost}", BlockSparse(density=0.5))
    probe.calls = [
        {"run": run, "layer": 0, "step": step, "l2": error * spread**run, "shift": error, "cost": cost, "seconds": 1.0}
        for run in range(runs)
        for step in range(2)
    ]
    return probe


def test_errors_are_read_off_the_curve_at_one_cost() -> None:
    ours = [rung(0.4, 0.01), rung(0.1, 0.04)]  # error = 0.004 / cost
    theirs = [rung(0.5, 0.02), rung(0.05, 0.2)]  # error = 0.01 / cost
    for cost in (0.1, 0.2, 0.4):
        figure = equal_cost.ratio(ours, theirs, cost, "l2")
        assert figure is not None and figure["value"] == pytest.approx(0.4) and figure["n"] == 2
    assert equal_cost.ratio(ours, theirs, 0.45, "l2") is None  # nothing is extrapolated
    assert list(equal_cost.at_cost({"theirs": theirs, "ours": ours}, 0.2, "rms")) == ["ours", "theirs"]
    assert list(equal_cost.at_cost({"theirs": theirs, "ours": ours}, 0.06, "rms")) == ["theirs"]


def test_the_interval_of_a_ratio_is_paired() -> None:
    ours = [rung(0.5, 0.01, 4, 3.0), rung(0.05, 0.02, 4, 3.0)]
    theirs = [rung(0.5, 0.02, 4, 3.0), rung(0.05, 0.04, 4, 3.0)]
    figure = equal_cost.ratio(ours, theirs, 0.2, "l2")
    assert figure is not None and figure["ci95"] == pytest.approx([0.5, 0.5])


def test_targets_are_met_only_when_every_cost_meets_them() -> None:
    def found(at_high: float) -> dict[str, list[Probe]]:
        return {
            "default": [rung(0.5, at_high), rung(0.05, 0.03)],
            "none hilbert": [rung(0.5, 0.1), rung(0.05, 0.1)],
            "paper hilbert": [rung(0.5, 0.1), rung(0.05, 0.1)],
        }

    assert [target["met"] for target in equal_cost.targets(found(0.03))] == [True, True, True]
    missed = equal_cost.targets(found(0.2))
    assert [target["met"] for target in missed] == [False, False, False]
    assert missed[0]["worst"] == pytest.approx(max(f["value"] for f in missed[0]["at"].values()))
    assert not equal_cost.targets({"default": found(0.03)["default"]})


def test_every_family_makes_methods_of_its_density_and_names_are_checked() -> None:
    for block in (32, 36, 64):
        for family in equal_cost.families(block):
            method = family.make(0.125, block)
            assert method.density == 0.125 and method.dense_steps == 0
            assert method.kv_block == (block // 2 if family.name.endswith("half") else block)
    assert equal_cost.virtual_sizes(36) == [36, 18, 9] and equal_cost.virtual_sizes(64) == [64, 32, 16]
    with pytest.raises(DitAttnError, match=r"no family 'merge 7'.*default"):
        equal_cost.chosen(["merge 7"], 32)
