"""Strategies find planted heads, count what they make, resume after a stop, and agree across processes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dit_attn.errors import DitAttnError
from dit_attn.pipelines.head_search import config, strategies
from dit_attn.pipelines.head_search.evaluation import Arm, Evaluator, Pair
from dit_attn.pipelines.head_search.objective import Objective
from dit_attn.pipelines.head_search.strategies import best_heads, halving_rungs, run_rounds, tune_strengths
from dit_attn.pipelines.measurement_log import MeasurementLog
from tests._support.planted_heads import HEADS, LAYERS, STEPS, PlantedRunner, plan, planted, random_worths


def test_one_round_is_the_ranking_by_brute_force() -> None:
    worth = random_worths()
    found = run_rounds(planted(PlantedRunner(worth)), plan(rounds=1, per_round=7, pairs=4))
    assert found[0].chosen == best_heads(worth, 7) and set(found[0].scores) == set(HEADS)


def test_a_head_that_helps_only_beside_another_is_found_in_the_second_round() -> None:
    first, partner = HEADS[10], HEADS[90]
    worth = {first: 1.0, partner: -0.5, frozenset({first, partner}): 3.0, HEADS[3]: 0.4}
    found = run_rounds(planted(PlantedRunner(worth)), plan(rounds=2, per_round=1, pairs=2))
    assert [one.chosen for one in found] == [[first], [partner]]


def test_selected_heads_never_come_back_and_evaluations_are_counted() -> None:
    runner = PlantedRunner(random_worths())
    ours = planted(runner, 3)
    found = run_rounds(ours, plan(rounds=4, per_round=3, pairs=3))
    chosen = [head for one in found for head in one.chosen]
    assert len(set(chosen)) == 12
    for number, one in enumerate(found):
        assert not set(one.scores) & set(chosen[: 3 * number])
    wanted = sum((len(HEADS) - 3 * number) * 3 for number in range(4))
    assert ours.images["candidates"] == len(runner.made) == wanted
    assert ours.passes["candidates"] == wanted * 2 * STEPS


def test_every_arm_starts_from_the_same_noise() -> None:
    runner = PlantedRunner(random_worths())
    run_rounds(planted(runner, 3), plan(rounds=1, per_round=1, pairs=3))
    seeds: dict[Arm, list[int]] = {}
    for arm, seed, _ in runner.made:
        seeds.setdefault(arm, []).append(seed)
    assert len(seeds) == len(HEADS) and all(one == [0, 1, 2] for one in seeds.values())


def test_a_stopped_search_goes_on_where_it_was_with_the_same_result(tmp_path: Path) -> None:
    wanted = plan(rounds=3, per_round=2, pairs=2)
    whole = run_rounds(planted(PlantedRunner(random_worths())), wanted)
    place = tmp_path / "store.jsonl"

    class Stopped(PlantedRunner):
        def __call__(self, arm: Arm, pairs: Sequence[Pair], steps: int | None) -> tuple[list[Any], float]:
            if len(self.made) >= 251:
                raise KeyboardInterrupt
            return super().__call__(arm, pairs, steps)

    first = Stopped(random_worths())
    with pytest.raises(KeyboardInterrupt):
        run_rounds(planted(first, log=MeasurementLog(place, {"a": 1})), wanted)
    second = PlantedRunner(random_worths())
    again = run_rounds(planted(second, log=MeasurementLog(place, {"a": 1}, resume=True)), wanted)
    assert again == whole
    assert len(first.made) + len(second.made) == sum((len(HEADS) - 2 * number) * 2 for number in range(3))
    with pytest.raises(DitAttnError, match="another model"):
        MeasurementLog(place, {"a": 2}, resume=True)


def test_halving_finds_planted_heads_under_noise_at_a_fifth_of_the_steps() -> None:
    hits = []
    for seed in range(10):
        good = [HEADS[i] for i in np.random.default_rng(seed).choice(len(HEADS), 3, replace=False)]
        runner = PlantedRunner(dict.fromkeys(good, 2.0), noise=0.4)
        wanted = plan(rounds=1, per_round=3, pairs=16, strategy="halving", full_steps=STEPS)
        found = run_rounds(planted(runner, 16), wanted)
        hits.append(set(found[0].chosen) == set(good))
        assert runner.steps <= 0.2 * len(HEADS) * 16 * STEPS
    assert sum(hits) >= 9


def test_rungs_shrink_in_heads_and_grow_in_pairs_and_steps() -> None:
    found = halving_rungs(576, plan(per_round=24, pairs=20, full_steps=20))
    heads, pairs, steps = (list(column) for column in zip(*found))
    assert heads[0] == 576 and heads == sorted(heads, reverse=True) and heads[-1] >= 48
    assert pairs == sorted(pairs) and pairs[-1] == 20 and steps[-1] is None and steps[0] < 20
    assert halving_rungs(4, plan(per_round=3, pairs=2)) == [(4, 2, None)]


def test_an_arm_that_breaks_down_is_never_chosen() -> None:
    class Broken(PlantedRunner):
        def __call__(self, arm: Arm, pairs: Sequence[Pair], steps: int | None) -> tuple[list[Any], float]:
            out, cost = super().__call__(arm, pairs, steps)
            return ([None] * len(out) if any(head[:2] == HEADS[5] for head in arm) else out), cost

    found = run_rounds(planted(Broken({HEADS[5]: 9.0, HEADS[6]: 1.0})), plan(rounds=1, per_round=2, pairs=2))
    assert found[0].chosen[0] == HEADS[6] and HEADS[5] not in found[0].chosen


def test_heads_without_a_finite_score_are_never_chosen_and_a_round_without_any_is_refused() -> None:
    def only_one(images: Sequence[np.ndarray], prompts: Sequence[str]) -> list[float]:
        return [score if score > 0.5 else float("nan") for score in (float(image.min()) for image in images)]

    class Bare(PlantedRunner):
        def __call__(self, arm: Arm, pairs: Sequence[Pair], steps: int | None) -> tuple[list[Any], float]:
            value = sum(self.worth.get((layer, head), 0.0) for layer, head, _ in arm)
            return [np.full((1, 1, 1, 1), value) for _ in pairs], 1.0

    def ours(worth: dict[Any, float]) -> Evaluator:
        return Evaluator(Bare(worth), Objective("mine", only_one), [Pair("a", 0)], LAYERS)

    found = run_rounds(ours({HEADS[5]: 1.0}), plan(rounds=1, per_round=3))
    assert found[0].chosen == [HEADS[5]]
    with pytest.raises(DitAttnError, match="mine gave no finite score to any head of round 1"):
        run_rounds(ours({}), plan(rounds=1, per_round=3))


def test_tuning_lowers_the_strength_of_a_head_that_harms_and_keeps_one_that_helps() -> None:
    good, bad = HEADS[0], HEADS[9]
    ours = planted(PlantedRunner({good: 1.0, bad: -1.0}))
    arm, tried = tune_strengths(ours, ours.ordered([(*good, 0.5), (*bad, 1.0)]), 2, None, 2)
    assert arm == ((*good, 1.0),) and tried and ours.images["strengths"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rounds": 40, "per_round": 3}, "the model has 96 heads"),
        ({"strategy": "luck"}, "unknown value of search.strategy 'luck'.*greedy, halving, gradient"),
        ({"u": 0.0}, "search.u must be above 0"),
        ({"u": 1.5}, "search.u must be between 0.0 and 1.0, got 1.5"),
        ({"u": "much"}, "search.u must be a number"),
        ({"rounds": 0}, "search.rounds must be at least 1, got 0"),
        ({"per_round": 0}, "search.per_round must be at least 1, got 0"),
        ({"pairs": 0}, "at least 1 pair"),
        ({"keep": 1.0}, "search.keep must be above 1"),
        ({"screen": 0.0}, "search.screen must be above 0"),
        ({"steps": 0}, "search.steps must be at least 1, got 0"),
        ({"steps": 9, "full_steps": 8}, "search.steps lies in 1 to 8, the steps of the run, got 9"),
        ({"strategy": "gradient"}, "can be differentiated"),
    ],
)
def test_plans_that_cannot_be_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(DitAttnError, match=words):
        run_rounds(planted(PlantedRunner({})), plan(**settings))


def test_every_strategy_of_the_settings_is_implemented() -> None:
    assert tuple(strategies.STRATEGIES) == config.STRATEGY_NAMES


CHILD = """
import json, torch
from dit_attn.cli.workers import join_workers
from dit_attn.pipelines.head_search.strategies import run_rounds
from tests._support.planted_heads import PlantedRunner, plan, planted, random_worths
_, worker = join_workers(torch.device("cpu"), False)
runner = PlantedRunner(random_worths())
found = run_rounds(planted(runner, 2, worker=worker), plan(rounds=2, per_round=2, pairs=2))
print("RESULT" + json.dumps([[one.chosen for one in found], len(runner.made)]))
torch.distributed.destroy_process_group()
"""


def test_two_processes_share_the_work_and_agree_with_one(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    several = [
        subprocess.Popen(
            [sys.executable, "-c", CHILD], stdout=subprocess.PIPE, text=True,
            env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank), "CUDA_VISIBLE_DEVICES": ""},
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [one.communicate(timeout=300)[0] for one in several]
    results = [json.loads(text.partition("RESULT")[2]) for text in said]
    alone = PlantedRunner(random_worths())
    found = run_rounds(planted(alone, 2), plan(rounds=2, per_round=2, pairs=2))
    chosen = [[list(head) for head in one.chosen] for one in found]
    assert [one[0] for one in results] == [chosen, chosen]
    made = [one[1] for one in results]
    assert sum(made) == len(alone.made) and abs(made[0] - made[1]) <= 4
