"""Rows of the benchmark table: ratios within rounds, ceilings and targets."""

from __future__ import annotations

import pytest

from dit_attn.pipelines.benchmark.step_table import (
    AttentionTimes,
    StepTimes,
    Times,
    attention_row,
    dense_row,
    step_row,
)


def test_ratios_are_taken_within_rounds() -> None:
    dense = StepTimes(Times([1.0, 10.0, 100.0], [1.0, 1.0, 1.0]))
    mine = StepTimes(Times([0.5, 5.0, 60.0], [0.25, 0.25, 0.25]), calls=4, sparse_calls=2, computed=0.5)
    row = step_row(mine, dense, attention_share=0.8)
    assert row["ratio"] == {"median": 0.5, "min": 0.5, "max": 0.6} and row["speedup"] == 2.0
    assert row["speedup_cpu"] == 4.0
    assert row["density"] == 0.25 and row["step_density"] == (0.5 + 2) / 4
    assert row["ceiling"] == pytest.approx(1 / (0.2 + 0.8 * 0.625))


@pytest.mark.parametrize(("run", "met"), [(0.39, True), (0.45, False)])
def test_the_target_is_six_tenths_of_one_over_density_with_choosing_counted(run, met) -> None:
    part = AttentionTimes(Times([0.02], [0.02]), Times([run], [run]), density=0.25)
    row = attention_row(part, AttentionTimes(run=Times([1.0], [1.0])), sparse=True)
    assert row["target"] == pytest.approx(2.4) and row["met"] is met and row["met_cpu"] is met
    assert row["speedup"] == pytest.approx(1 / (run + 0.02)) and row["plan_share"] == pytest.approx(0.02 / (run + 0.02))
    assert row["efficiency"] == pytest.approx(row["speedup"] * 0.25)


def test_processor_time_has_no_figures_where_an_accelerator_works() -> None:
    dense, mine = StepTimes(Times([1.0], [0.0])), StepTimes(Times([0.5], [0.0]), calls=1, sparse_calls=1, computed=0.5)
    row = step_row(mine, dense, 0.5)
    assert row["speedup"] == 2.0 and (row["speedup_cpu"], row["ratio_cpu"], row["cpu_seconds"]) == (None, None, None)
    part = attention_row(
        AttentionTimes(Times([0.1], [0.0]), Times([0.4], [0.0]), 0.5), AttentionTimes(run=Times([1.0], [0.0])), True
    )
    assert part["met"] is True and (part["speedup_cpu"], part["met_cpu"]) == (None, None)
    assert dense_row(dense, AttentionTimes(run=Times([0.25], [0.0])), 2)["attention_share"] == 0.5
