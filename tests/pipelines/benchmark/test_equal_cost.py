"""Method families are compared at equal cost, on curves that are never extrapolated."""

from __future__ import annotations

import pytest

from dit_attn import BlockSparse, DitAttnError
from dit_attn.pipelines.benchmark import equal_cost
from dit_attn.pipelines.benchmark.operator_error import OperatorProbe, measure_operators, synthetic_source


def made_up_probe(cost: float, error: float, runs: int = 2, spread: float = 1.0) -> OperatorProbe:
    """A probe whose calls are made up: errors grow by ``spread`` from run to run."""
    probe = OperatorProbe(f"{cost}", BlockSparse(density=0.5))
    probe.calls = [
        {"run": run, "layer": 0, "step": step, "l2": error * spread**run, "shift": error, "cost": cost, "seconds": 1.0}
        for run in range(runs)
        for step in range(2)
    ]
    return probe


def test_errors_are_read_off_the_curve_at_one_cost() -> None:
    ours = [made_up_probe(0.4, 0.01), made_up_probe(0.1, 0.04)]  # error = 0.004 / cost
    theirs = [made_up_probe(0.5, 0.02), made_up_probe(0.05, 0.2)]  # error = 0.01 / cost
    for cost in (0.1, 0.2, 0.4):
        figure = equal_cost.error_ratio(ours, theirs, cost, "l2")
        assert figure is not None and figure["value"] == pytest.approx(0.4) and figure["n"] == 2
    assert equal_cost.error_ratio(ours, theirs, 0.45, "l2") is None  # nothing is extrapolated
    assert list(equal_cost.errors_at_cost({"theirs": theirs, "ours": ours}, 0.2, "rms")) == ["ours", "theirs"]
    assert list(equal_cost.errors_at_cost({"theirs": theirs, "ours": ours}, 0.06, "rms")) == ["theirs"]


def test_the_interval_of_a_ratio_is_paired() -> None:
    ours = [made_up_probe(0.5, 0.01, 4, 3.0), made_up_probe(0.05, 0.02, 4, 3.0)]
    theirs = [made_up_probe(0.5, 0.02, 4, 3.0), made_up_probe(0.05, 0.04, 4, 3.0)]
    figure = equal_cost.error_ratio(ours, theirs, 0.2, "l2")
    assert figure is not None and figure["ci95"] == pytest.approx([0.5, 0.5])


def test_targets_are_met_only_when_every_cost_meets_them() -> None:
    def found(at_high: float) -> dict[str, list[OperatorProbe]]:
        return {
            "default": [made_up_probe(0.5, at_high), made_up_probe(0.05, 0.03)],
            "none hilbert": [made_up_probe(0.5, 0.1), made_up_probe(0.05, 0.1)],
            "paper hilbert": [made_up_probe(0.5, 0.1), made_up_probe(0.05, 0.1)],
        }

    assert [target["met"] for target in equal_cost.check_targets(found(0.03))] == [True, True, True]
    missed = equal_cost.check_targets(found(0.2))
    assert [target["met"] for target in missed] == [False, False, False]
    assert missed[0]["worst"] == pytest.approx(max(f["value"] for f in missed[0]["at"].values()))
    assert not equal_cost.check_targets({"default": found(0.03)["default"]})


def test_every_family_makes_methods_of_its_density_and_names_are_checked() -> None:
    for block in (32, 36, 64):
        for family in equal_cost.method_families(block):
            method = family.make(0.125, block)
            assert method.density == 0.125 and method.dense_steps == 0
            assert method.kv_block == (block // 2 if family.name.endswith("half") else block)
    assert equal_cost.pooled_key_sizes(36) == [36, 18, 9] and equal_cost.pooled_key_sizes(64) == [64, 32, 16]
    with pytest.raises(DitAttnError, match=r"no family 'merge 7'.*default"):
        equal_cost.select_families(["merge 7"], 32)


def test_an_oracle_bounds_the_estimates_and_is_never_the_best_family() -> None:
    source = synthetic_source((4, 8, 8), steps=1)
    chosen = equal_cost.select_families(["default", "by mass", "oracle mass", "oracle error, a row"], 16)
    measured = equal_cost.make_probes(chosen, (0.5, 0.25, 0.125), 16, 1)
    measure_operators(source, 2, [probe for probes in measured.values() for probe in probes])
    at = equal_cost.summarize_families(measured)
    errors = at["equal_cost"]["l2"]["0.25"]
    assert next(iter(errors)) == "oracle error, a row"
    assert errors["oracle mass"]["value"] < errors["by mass"]["value"]
    assert at["best"]["0.25"]["family"] in ("default", "by mass")
