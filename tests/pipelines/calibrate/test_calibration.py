"""Calibration from measurements to a method: its budget, its check, its record, and that it goes on where it was."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dit_attn
from dit_attn import BlockSparse, DitAttnError, Method
from dit_attn.pipelines.calibrate import Calibration, calibrate, make_plan
from dit_attn.pipelines.calibrate.calibration import check_items, compare_checks
from dit_attn.pipelines.calibrate.runs import RequestedRuns
from dit_attn.pipelines.measurement_log import MeasurementLog
from dit_attn.pipelines.run import answered_here
from tests._support import tiny_run
from tests._support.tiny_run import LAYERS, STEPS, CountedRuns

METHOD = BlockSparse(density=0.25, q_block=32, kv_block=32, dense_steps=0.5, max_error=5.0)
PLAN = make_plan(METHOD, parts=2, densities=(0.5, 0.125), steps=STEPS)
RUNS = 1 + 1 + LAYERS + 2  # of one item: dense, all sparse, every layer, every part


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny_run.load()


@pytest.fixture(scope="module")
def done(pipe: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Calibration, Path, CountedRuns]:
    """One item calibrated on, two to check, from a log on disk."""
    path, runs = tmp_path_factory.mktemp("calibrate") / "m.jsonl", CountedRuns(pipe)
    provenance = {"model": "tiny-image"}
    found = calibrate(
        pipe, runs, ["red"], PLAN, MeasurementLog(path, {}), check=["blue", "green"], provenance=provenance
    )
    return found, path, runs


def test_without_a_budget_it_costs_no_more_than_one_density(done: Any) -> None:
    found = done[0]
    assert found.expected["calibrated"]["cost"] <= found.expected["uniform"]["cost"] + 1e-9
    assert found.expected["uniform"]["cost"] == pytest.approx(1 - 0.75 / 2, abs=1e-6)  # half of the steps are dense
    assert found.expected["calibrated"]["error"] <= found.expected["uniform"]["error"]
    assert found.densities.shape == (2, LAYERS) and len(np.unique(found.densities)) > 1


def test_the_check_measures_the_costs_that_were_expected(done: Any) -> None:
    found, _, runs = done
    assert runs.made == {"red": RUNS, "blue": 3, "green": 3}
    checked = found.checked
    for name in ("calibrated", "uniform"):
        assert checked[name]["cost"] == pytest.approx(found.expected[name]["cost"], abs=0.01)
        assert checked[name]["error"]["n"] == 2
    ratio = checked["calibrated"]["error"]["value"] / checked["uniform"]["error"]["value"]
    assert checked["ratio"]["value"] == pytest.approx(ratio, rel=1e-6)
    low, high = checked["ratio"]["ci95"]
    assert low <= ratio * (1 + 1e-9) and ratio <= high * (1 + 1e-9)


def test_the_method_runs_and_keeps_its_other_settings(pipe: Any, done: Any, tmp_path: Path) -> None:
    found = done[0]
    method = found.method
    assert (method.max_error, method.q_block, method.dense_steps, method.parts) == (5.0, 32, 0, 2)
    assert method.calibration["transformer"] == "PixArtTransformer2DModel" and method.calibration["layers"] == LAYERS
    assert method.calibration["model"] == "tiny-image" and method.calibration["checked"] == found.checked
    path = method.save_pretrained(tmp_path)
    assert Method.from_pretrained(path) == method
    with dit_attn.enabled(pipe, str(path)):
        CountedRuns(pipe)("blue")
        cost = dit_attn.summary(pipe).run_density
    assert cost == pytest.approx(found.checked["calibrated"]["cost"], abs=0.01)


def test_it_goes_on_where_it_was_and_finds_the_same(pipe: Any, done: Any, tmp_path: Path) -> None:
    found, path, _ = done
    again = CountedRuns(pipe)
    same = calibrate(pipe, again, ["red"], PLAN, MeasurementLog(path, {}, resume=True), check=["blue", "green"])
    assert not again.made and same.method == found.method and same.checked == found.checked

    cut, file = CountedRuns(pipe, stop_at=4), tmp_path / "m.jsonl"
    with pytest.raises(KeyboardInterrupt):
        calibrate(pipe, cut, ["red"], PLAN, MeasurementLog(file, {}), check=["blue", "green"])
    rest = CountedRuns(pipe)
    same = calibrate(pipe, rest, ["red"], PLAN, MeasurementLog(file, {}, resume=True), check=["blue", "green"])
    assert rest.made["red"] == RUNS - 4 + 1 and rest.made["blue"] == 3  # the dense run is needed once more
    assert same.method == found.method
    assert same.checked["ratio"]["value"] == pytest.approx(found.checked["ratio"]["value"], rel=1e-4)


def test_densities_of_every_head_are_checked_against_those_of_layers_too(pipe: Any, done: Any, tmp_path: Path) -> None:
    plan = make_plan(METHOD, parts=2, densities=(0.5, 0.125), steps=STEPS, by_head=True)
    log, runs = MeasurementLog(done[1], {}, resume=True), CountedRuns(pipe)
    found = calibrate(pipe, runs, ["red"], plan, log, check=["blue", "green"])
    assert runs.made["red"] == 1 and found.densities.shape == (2, LAYERS, 2)
    assert found.method.densities == tuple(tuple(row) for row in found.densities.reshape(-1, 2).tolist())
    assert Method.from_pretrained(found.method.save_pretrained(tmp_path)) == found.method
    assert found.expected["calibrated"]["error"] <= done[0].expected["calibrated"]["error"] + 1e-9
    checked = found.checked
    assert checked is not None
    for name in ("calibrated", "by layer"):
        assert checked[name]["cost"] == pytest.approx(found.expected["calibrated"]["cost"], abs=0.01)
    ratio = checked["calibrated"]["error"]["value"] / checked["by layer"]["error"]["value"]
    assert checked["head_ratio"]["value"] == pytest.approx(ratio, rel=1e-6) and checked["ratio"]["n"] == 2


def test_another_budget_measures_nothing_new(pipe: Any, done: Any) -> None:
    path = done[1]
    for budget in ({"cost": 0.3}, {"cost": 0.9}, {"error": 1e-3}, {"error": 10.0}):
        runs = CountedRuns(pipe)
        found = calibrate(pipe, runs, ["red"], PLAN, MeasurementLog(path, {}, resume=True), **budget)
        assert not runs.made and found.checked is None
        for name, value in budget.items():
            assert found.expected["calibrated"][name] <= value + 1e-6
    assert (found.densities == found.densities.min()).all()  # an error that anything meets


def test_two_budgets_or_one_that_cannot_be_met_are_refused(pipe: Any, done: Any) -> None:
    log = MeasurementLog(done[1], {}, resume=True)
    with pytest.raises(DitAttnError, match="a cost or an error, not both"):
        calibrate(pipe, CountedRuns(pipe), ["red"], PLAN, log, cost=0.3, error=0.1)
    with pytest.raises(DitAttnError, match=r"--cost 0\.01 is below"):
        calibrate(pipe, CountedRuns(pipe), ["red"], PLAN, log, cost=0.01)


def test_the_comparison_pairs_the_errors_of_every_item() -> None:
    log = MeasurementLog()
    for i, (ours, theirs) in enumerate([(0.1, 0.2), (0.02, 0.04), (0.3, 0.6)]):
        log.rows[f"check/{i}/a"] = {"error": ours, "cost": 0.2}
        log.rows[f"check/{i}/b"] = {"error": theirs, "cost": 0.3}
    found = compare_checks(log, ["0", "1", "2"], "a", "b")
    assert found["ratio"]["value"] == pytest.approx(0.5) and found["ratio"]["ci95"] == pytest.approx([0.5, 0.5])
    assert found["a"]["error"]["value"] == pytest.approx(math.prod((0.1, 0.02, 0.3)) ** (1 / 3))
    assert (found["a"]["cost"], found["b"]["cost"]) == pytest.approx((0.2, 0.3))


def test_a_check_is_taken_over_only_for_the_same_method(pipe: Any) -> None:
    log, runs = MeasurementLog(), lambda item: torch.ones(1, 4, 8, 8)
    answers = answered_here(RequestedRuns(pipe, runs, PLAN))
    other = BlockSparse(density=0.5, q_block=32, kv_block=32)
    check_items(["red"], {"a": METHOD}, log, answers)
    rows = dict(log.rows)
    check_items(["red"], {"a": METHOD}, log, answers)
    assert log.rows == rows
    check_items(["red"], {"a": other}, log, answers)
    assert len(log.rows) == len(rows) + 1
