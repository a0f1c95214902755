"""The measurements of a calibration: what they are, that they survive, and which set-ups are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dit_attn
from dit_attn import BlockSparse, DitAttnError, RectifiedSpaAttn, ReTtention, SoftPAG
from dit_attn.errors import RunStopped
from dit_attn.pipelines.calibrate import sensitivity
from dit_attn.pipelines.calibrate.sensitivity import measure_item, new_plan, runs_of
from dit_attn.pipelines.measurement_log import Store
from tests._support import tiny_run
from tests._support.tiny_run import LAYERS, METHOD, STEPS, CountedPlay

PLAN = new_plan(METHOD, parts=2, ladder=(0.5, 0.125), steps=STEPS)
SETUP = {"model": "m", "ladder": (0.5, 0.25)}


def silent(line: str) -> None:
    """Say nothing."""


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny_run.load()


@pytest.fixture(scope="module")
def measured(pipe: Any) -> tuple[Store, CountedPlay]:
    """One item, measured whole."""
    store, play = Store(), CountedPlay(pipe)
    measure_item(pipe, play, "red", PLAN, store, silent)
    return store, play


def test_an_item_is_run_dense_once_and_once_for_every_layer_and_part(measured: tuple[Store, CountedPlay]) -> None:
    store, play = measured
    keys = {"local/red", "all/red", *(f"layer/red/{n}" for n in range(LAYERS)), "part/red/0", "part/red/1"}
    assert set(store.rows) == keys == {"local/red", *runs_of("red", PLAN, LAYERS)}
    assert play.made == {"red": len(keys)}  # the dense run is that of the local measurement


def test_local_errors_fall_and_costs_rise_with_density(measured: tuple[Store, CountedPlay]) -> None:
    local = measured[0].rows["local/red"]
    error2, cost, calls = (np.asarray(local[name]) for name in ("error2", "cost", "calls"))
    assert error2.shape == cost.shape == (3, 2, LAYERS) and calls.shape == (2, LAYERS)
    assert (np.diff(error2, axis=0) > 0).all() and (np.diff(cost, axis=0) < 0).all()  # the ladder descends
    assert cost == pytest.approx(np.broadcast_to(np.array(PLAN.ladder)[:, None, None], cost.shape))
    assert (calls == calls[0, 0]).all() and (local["steps"], local["tokens"]) == (STEPS, 256)


def test_effects_at_the_end_are_those_of_the_tables_they_stand_for(pipe: Any, measured: Any) -> None:
    store, _ = measured
    play = CountedPlay(pipe)
    dense = sensitivity.plain(play, "red")
    alone = np.ones((2, LAYERS))
    alone[:, 3] = PLAN.density
    found = sensitivity.distance(pipe, play, "red", PLAN.table(alone), dense)
    assert found["error"] == pytest.approx(store.rows["layer/red/3"], rel=1e-5)
    assert found["cost"] == pytest.approx(1 - 0.75 / LAYERS)
    effects = [value for key, value in store.rows.items() if key.startswith(("layer", "part", "all"))]
    assert all(0 < value < sensitivity.RUINED for value in effects)
    whole = sensitivity.distance(pipe, play, "red", PLAN.at(1.0), dense)
    assert whole == {"error": 0.0, "cost": 1.0}


def test_a_later_call_measures_nothing_twice(pipe: Any, measured: tuple[Store, CountedPlay]) -> None:
    play = CountedPlay(pipe)
    measure_item(pipe, play, "red", PLAN, measured[0], silent)
    assert not play.made
    part = Store()
    part.rows = {key: value for key, value in measured[0].rows.items() if key not in ("layer/red/2", "all/red")}
    measure_item(pipe, play, "red", PLAN, part, silent)
    assert play.made == {"red": 3}  # dense, and the two that were missing
    assert part.rows.keys() == measured[0].rows.keys()
    assert all(part.rows[key] == pytest.approx(measured[0].rows[key], rel=1e-5) for key in ("layer/red/2", "all/red"))


def test_ranking_by_pieces_counts_as_cost(pipe: Any) -> None:
    pieces = RectifiedSpaAttn(density=0.25, q_block=32, kv_block=32, dense_steps=0, probe=8)
    play = CountedPlay(pipe)
    dense = sensitivity.plain(play, "red")
    costs = [
        sensitivity.distance(pipe, play, "red", method, dense)["cost"]
        for method in (pieces, RectifiedSpaAttn(density=0.25, q_block=32, kv_block=32, dense_steps=0))
    ]
    assert costs[0] - costs[1] == pytest.approx(1.5 / 64, abs=1e-6)


def test_a_result_that_fell_apart_has_the_largest_error(pipe: Any) -> None:
    nan = lambda item: torch.full((1, 4, 8, 8), float("nan"))  # noqa: E731
    found = sensitivity.distance(pipe, nan, "red", METHOD, torch.ones(1, 4, 8, 8))
    assert found["error"] == sensitivity.RUINED
    with pytest.raises(DitAttnError, match="dense run of red is NaN"):
        sensitivity.plain(nan, "red")


def test_a_run_without_a_call_to_touch_is_refused(pipe: Any) -> None:
    small = {**tiny_run.CALL, "height": 32, "width": 32}

    def play(item: str) -> torch.Tensor:
        latents: torch.Tensor = pipe("a circle", output_type="latent", **small).images
        return latents

    with pytest.raises(DitAttnError, match="no attention call of this run can be made sparse"):
        measure_item(pipe, play, "red", PLAN, Store(), silent)


def test_looking_too_seldom_is_refused(pipe: Any) -> None:
    plan = new_plan(METHOD, parts=2, ladder=(0.5,), every=8, steps=STEPS)
    with pytest.raises(DitAttnError, match="smaller --every or fewer --parts"):
        measure_item(pipe, CountedPlay(pipe), "red", plan, Store(), silent)


# -- plans -------------------------------------------------------------------------------------------------------------


def test_a_plan_has_the_density_of_its_method_among_its_rungs() -> None:
    plan = new_plan(METHOD, ladder=(0.125, 0.5), steps=20)
    assert plan.ladder == (0.5, 0.25, 0.125) and plan.density == 0.25 and (plan.parts, plan.every) == (10, 2)
    assert new_plan(METHOD, steps=4).parts == 4
    assert new_plan(ReTtention(density=0.25), steps=20).parts == 1


def test_the_table_takes_over_the_dense_exceptions() -> None:
    method = BlockSparse(density=0.25, dense_steps=0.1, dense_layers=(0,), max_error=0.5)
    free = new_plan(method, parts=2).free
    assert (free.dense_steps, free.dense_layers, free.max_error) == (0, (), None)
    assert new_plan(method, parts=1).free.dense_steps == 0.1  # one part cannot say which steps are dense


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: new_plan(SoftPAG()), "softpag has no density to calibrate"),
        (lambda: new_plan(BlockSparse(top_p=0.9)), "no top_p"),
        (lambda: new_plan(BlockSparse(density=0.5, densities=(0.5,))), "densities is set"),
        (lambda: new_plan(METHOD, ladder=(0.5, 1.0)), "below 1, got 1.0"),
        (lambda: new_plan(METHOD, ladder=(0.25,)), "one density to measure is not enough"),
        (lambda: new_plan(ReTtention(density=0.25), parts=2), "parts must be 1, got 2"),
        (lambda: new_plan(METHOD, parts=9, steps=4), "4 steps has no 9 parts"),
    ],
)
def test_plans_that_make_no_sense_are_refused(make: Any, words: str) -> None:
    with pytest.raises(DitAttnError, match=words):
        make()


# -- the store ---------------------------------------------------------------------------------------------------------


def test_a_store_gives_back_what_was_put(tmp_path: Path) -> None:
    path, told = tmp_path / "m.jsonl", []
    store = Store(path, SETUP, told=told.append)
    store.put("all/a", 0.1)
    store.put("local/a", {"error2": [[0.1]]})
    assert told == ["all/a", "local/a"]
    again = Store(path, SETUP, resume=True)
    assert again.rows == store.rows
    again.put("all/b", 0.2)
    assert set(Store(path, SETUP, resume=True).rows) == {"all/a", "local/a", "all/b"}


def test_a_line_that_was_cut_off_is_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    store = Store(path, SETUP)
    store.put("all/a", 0.1)
    store.put("all/b", 0.2)
    path.write_text(path.read_text()[:-7])
    again = Store(path, SETUP, resume=True)
    assert again.rows == {"all/a": 0.1}
    again.put("all/b", 0.2)
    assert Store(path, SETUP, resume=True).rows == store.rows
    path.write_text(json.dumps({"setup": {}})[:5])  # not even the set-up was written
    assert Store(path, SETUP, resume=True).rows == {}


def test_a_store_of_another_setup_is_refused_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    Store(path, SETUP).put("all/a", 0.1)
    before = path.read_text()
    with pytest.raises(DitAttnError, match="another model, method, prompts or settings"):
        Store(path, {**SETUP, "model": "other"}, resume=True)
    assert path.read_text() == before


def test_beginning_anew_keeps_the_old_measurements_aside(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    Store(path, SETUP).put("all/a", 0.1)
    before = path.read_text()
    assert Store(path, {"model": "other"}).rows == {}
    assert (tmp_path / "m.jsonl.bak").read_text() == before and {p.name for p in tmp_path.iterdir()} == {
        "m.jsonl",
        "m.jsonl.bak",
    }


def test_a_disk_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    with pytest.raises(DitAttnError, match="choose another --output"):
        Store(tmp_path / "nowhere" / "m.jsonl", SETUP)
    store = Store(tmp_path / "m.jsonl", SETUP)
    (tmp_path / "m.jsonl").unlink()
    (tmp_path / "m.jsonl").mkdir()
    with pytest.raises(RunStopped, match="--resume"):
        store.put("all/a", 0.1)
    assert "all/a" not in store.rows


def test_a_method_that_was_on_the_pipeline_is_taken_off(pipe: Any) -> None:
    dit_attn.enable(pipe, METHOD)
    store, play = Store(), CountedPlay(pipe)
    store.rows = dict.fromkeys(runs_of("blue", PLAN, LAYERS), 0.1)
    measure_item(pipe, play, "blue", PLAN, store, silent)
    with pytest.raises(DitAttnError, match="no method is enabled"):
        dit_attn.summary(pipe)
