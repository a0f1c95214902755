"""A search finds planted heads, counts what it makes, and goes on where it stopped; cheap ways agree with the full."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dit_attn
from dit_attn.errors import DitAttnError
from dit_attn.pipelines.head_search import gradient, objectives
from dit_attn.pipelines.head_search.evaluation import Arm, Pair, PipelineMaker, Trials, layers_of
from dit_attn.pipelines.head_search.head_hunter import HeadHunter
from dit_attn.pipelines.head_search.head_set import HeadSet
from dit_attn.pipelines.head_search.objectives import Objective, Weights, objective
from dit_attn.pipelines.head_search.strategies import Plan, hunt, rungs, top, tuned
from dit_attn.pipelines.measurement_log import Store
from tests._support.compose import tiny_pipeline

LAYERS = {f"blocks.{i}.attn1": 8 for i in range(12)}
HEADS = [(layer, head) for layer, count in LAYERS.items() for head in range(count)]
STEPS = 20
STEP = 1e-3  # of a strength, for differences


class World:
    """A maker whose pictures carry the score of their arm: known worths of heads and of couples of heads, and noise."""

    def __init__(self, worth: dict[Any, float], noise: float = 0.0) -> None:
        self.worth, self.noise = worth, noise
        self.made: list[tuple[Arm, int, int]] = []
        self.steps = 0

    def __call__(self, arm: Arm, pairs: Sequence[Pair], steps: int | None) -> tuple[list[Any], float]:
        names = {(layer, head) for layer, head, _ in arm}
        value = sum(u * self.worth.get((layer, head), 0.0) for layer, head, u in arm)
        value += sum(w for couple, w in self.worth.items() if isinstance(couple, frozenset) and couple <= names)
        out = []
        for pair in pairs:
            self.made.append((arm, pair.seed, steps or STEPS))
            self.steps += steps or STEPS
            shared = np.random.default_rng(pair.seed).normal()  # the same for every arm: common random numbers
            own = np.random.default_rng(zlib.crc32(repr((arm, pair.seed, steps)).encode())).normal()
            out.append(np.full((1, 1, 1, 1), value + 5.0 * shared + self.noise * own))
        return out, 2.0 * (steps or STEPS)


def read(images: Sequence[np.ndarray], prompts: Sequence[str]) -> list[float]:
    return [float(image.reshape(-1)[0]) for image in images]


def trials(world: World, pairs: int = 4, store: Store | None = None, **more: Any) -> Trials:
    known = [Pair(f"prompt {i}", i) for i in range(pairs)]
    return Trials(world, Objective("planted", read), known, LAYERS, store=store, **more)


def worths(seed: int = 0) -> dict[Any, float]:
    values = np.random.default_rng(seed).normal(size=len(HEADS))
    return dict(zip(HEADS, values.tolist()))


def test_one_round_is_the_ranking_by_brute_force() -> None:
    worth = worths()
    found = hunt(trials(World(worth)), Plan(rounds=1, per_round=7, pairs=4))
    assert found[0].chosen == top(worth, 7) and set(found[0].scores) == set(HEADS)


def test_a_head_that_helps_only_beside_another_is_found_in_the_second_round() -> None:
    first, partner = HEADS[10], HEADS[90]
    worth = {first: 1.0, partner: -0.5, frozenset({first, partner}): 3.0, HEADS[3]: 0.4}
    found = hunt(trials(World(worth)), Plan(rounds=2, per_round=1, pairs=2))
    assert [one.chosen for one in found] == [[first], [partner]]


def test_selected_heads_never_come_back_and_evaluations_are_counted() -> None:
    world = World(worths())
    ours = trials(world, 3)
    found = hunt(ours, Plan(rounds=4, per_round=3, pairs=3))
    chosen = [head for one in found for head in one.chosen]
    assert len(set(chosen)) == 12
    for number, one in enumerate(found):
        assert not set(one.scores) & set(chosen[: 3 * number])
    wanted = sum((len(HEADS) - 3 * number) * 3 for number in range(4))
    assert ours.images["candidates"] == len(world.made) == wanted
    assert ours.passes["candidates"] == wanted * 2 * STEPS


def test_every_arm_starts_from_the_same_noise() -> None:
    world = World(worths())
    hunt(trials(world, 3), Plan(rounds=1, per_round=1, pairs=3))
    seeds: dict[Arm, list[int]] = {}
    for arm, seed, _ in world.made:
        seeds.setdefault(arm, []).append(seed)
    assert len(seeds) == len(HEADS) and all(one == [0, 1, 2] for one in seeds.values())


def test_a_stopped_search_goes_on_where_it_was_with_the_same_result(tmp_path: Path) -> None:
    plan = Plan(rounds=3, per_round=2, pairs=2)
    whole = hunt(trials(World(worths())), plan)
    place = tmp_path / "store.jsonl"

    class Stopped(World):
        def __call__(self, arm: Arm, pairs: Sequence[Pair], steps: int | None) -> tuple[list[Any], float]:
            if len(self.made) >= 251:
                raise KeyboardInterrupt
            return super().__call__(arm, pairs, steps)

    first = Stopped(worths())
    with pytest.raises(KeyboardInterrupt):
        hunt(trials(first, store=Store(place, {"a": 1})), plan)
    second = World(worths())
    again = hunt(trials(second, store=Store(place, {"a": 1}, resume=True)), plan)
    assert again == whole
    assert len(first.made) + len(second.made) == sum((len(HEADS) - 2 * number) * 2 for number in range(3))
    with pytest.raises(DitAttnError, match="another model"):
        Store(place, {"a": 2}, resume=True)


def test_halving_finds_planted_heads_under_noise_at_a_fifth_of_the_steps() -> None:
    hits = []
    for seed in range(10):
        planted = [HEADS[i] for i in np.random.default_rng(seed).choice(len(HEADS), 3, replace=False)]
        world = World(dict.fromkeys(planted, 2.0), noise=0.4)
        plan = Plan(rounds=1, per_round=3, pairs=16, strategy="halving", full_steps=STEPS)
        found = hunt(trials(world, 16), plan)
        hits.append(set(found[0].chosen) == set(planted))
        assert world.steps <= 0.2 * len(HEADS) * 16 * STEPS
    assert sum(hits) >= 9


def test_rungs_shrink_in_heads_and_grow_in_pairs_and_steps() -> None:
    found = rungs(576, Plan(per_round=24, pairs=20, full_steps=20))
    heads, pairs, steps = (list(column) for column in zip(*found))
    assert heads[0] == 576 and heads == sorted(heads, reverse=True) and heads[-1] >= 48
    assert pairs == sorted(pairs) and pairs[-1] == 20 and steps[-1] is None and steps[0] < 20
    assert rungs(4, Plan(per_round=3, pairs=2)) == [(4, 2, None)]


def test_an_arm_that_breaks_down_is_never_chosen() -> None:
    class Broken(World):
        def __call__(self, arm: Arm, pairs: Sequence[Pair], steps: int | None) -> tuple[list[Any], float]:
            out, cost = super().__call__(arm, pairs, steps)
            return ([None] * len(out) if any(head[:2] == HEADS[5] for head in arm) else out), cost

    found = hunt(trials(Broken({HEADS[5]: 9.0, HEADS[6]: 1.0})), Plan(rounds=1, per_round=2, pairs=2))
    assert found[0].chosen[0] == HEADS[6] and HEADS[5] not in found[0].chosen


def test_heads_without_a_finite_score_are_never_chosen_and_a_round_without_any_is_told_of() -> None:
    def only_one(images: Sequence[np.ndarray], prompts: Sequence[str]) -> list[float]:
        return [score if score > 0.5 else float("nan") for score in (float(image.min()) for image in images)]

    class Bare(World):
        def __call__(self, arm: Arm, pairs: Sequence[Pair], steps: int | None) -> tuple[list[Any], float]:
            value = sum(self.worth.get((layer, head), 0.0) for layer, head, _ in arm)
            return [np.full((1, 1, 1, 1), value) for _ in pairs], 1.0

    def ours(worth: dict[Any, float]) -> Trials:
        return Trials(Bare(worth), Objective("mine", only_one), [Pair("a", 0)], LAYERS)

    found = hunt(ours({HEADS[5]: 1.0}), Plan(rounds=1, per_round=3))
    assert found[0].chosen == [HEADS[5]]
    with pytest.raises(dit_attn.DitAttnError, match="mine gave no finite score to any head of round 1"):
        hunt(ours({}), Plan(rounds=1, per_round=3))


def test_lines_of_a_store_that_are_no_measurements_are_left_out(tmp_path: Path) -> None:
    place = tmp_path / "store.jsonl"
    Store(place, {"a": 1}).put("one", [1.0, 2.0, 1])
    with place.open("a") as file:
        file.write('{"key": "two"}\n{"key": [1], "value": 3}\n[]\n{"half')
    assert Store(place, {"a": 1}, resume=True).rows == {"one": [1.0, 2.0, 1]}


def test_tuning_lowers_the_strength_of_a_head_that_harms_and_keeps_one_that_helps() -> None:
    good, bad = HEADS[0], HEADS[9]
    ours = trials(World({good: 1.0, bad: -1.0}))
    arm, tried = tuned(ours, ours.ordered([(*good, 0.5), (*bad, 1.0)]), 2, None, 2)
    assert arm == ((*good, 1.0),) and tried and ours.images["strengths"]


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (Plan(rounds=40, per_round=3), "the model has 96 heads"),
        (Plan(strategy="luck"), "unknown strategy"),
        (Plan(u=0.0), "strength u"),
        (Plan(steps=0), "lie in 1 on, got 0"),
        (Plan(steps=9, full_steps=8), "lie in 1 to 8, those of the run, got 9"),
        (Plan(strategy="gradient"), "can be differentiated"),
    ],
)
def test_plans_that_cannot_be_are_refused(plan: Plan, words: str) -> None:
    with pytest.raises(DitAttnError, match=words):
        hunt(trials(World({})), plan)


CHILD = """
import json, sys, types, torch
from dit_attn.cli.commands.search.run import processes
from dit_attn.pipelines.head_search.strategies import Plan, hunt
from tests.pipelines.test_head_search import World, trials, worths
share = processes(types.SimpleNamespace(device=torch.device("cpu"), options={}))
world = World(worths())
found = hunt(trials(world, 2, share=share), Plan(rounds=2, per_round=2, pairs=2))
print("RESULT" + json.dumps([[one.chosen for one in found], len(world.made)]))
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
    alone = World(worths())
    found = hunt(trials(alone, 2), Plan(rounds=2, per_round=2, pairs=2))
    chosen = [[list(head) for head in one.chosen] for one in found]
    assert [one[0] for one in results] == [chosen, chosen]
    made = [one[1] for one in results]
    assert sum(made) == len(alone.made) and abs(made[0] - made[1]) <= 4


# -- on pipelines ------------------------------------------------------------------------------------------------------


def bright(images: Sequence[np.ndarray], prompts: Sequence[str]) -> list[float]:
    return [float(image.mean()) for image in images]


def light(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    weights = torch.linspace(0.5, 1.5, images.shape[-1], dtype=images.dtype)
    return (images * weights).flatten(1).mean(1)


class Embedded(PipelineMaker):
    """Tiny pipelines of the tests have no text encoder: the prompt is there as embeddings."""

    def run(self, pairs: Sequence[Pair], steps: int | None, **changes: Any) -> Any:
        noise = torch.Generator().manual_seed(pairs[0].seed)
        return self.pipe(**{**self.call, "output_type": "np", "generator": noise, **changes})


@pytest.mark.parametrize("name", ["sd3", "flux", "pixart"])
def test_slopes_of_all_heads_equal_finite_differences(name: str) -> None:
    pipe, kwargs = tiny_pipeline(name)
    for part in vars(pipe).values():
        if isinstance(part, torch.nn.Module):
            part.double()
    wide = {key: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for key, x in kwargs.items()}
    maker = Embedded(pipe, dit_attn.SoftPAG(heads="0:0", scale=2.0), {**wide, "num_inference_steps": 2})
    pairs, layers = [Pair("", 3)], layers_of(pipe)
    found = gradient.slopes_of(maker, light, (), pairs, 0.5)
    layer = list(layers)[-1]
    ours = [float(found[layer][0, head]) for head in range(layers[layer])]

    def at(head: int, u: float) -> float:
        return float(gradient.predicted(maker, light, ((layer, head, u),), pairs, 0.5)[0].detach())

    theirs = [(at(head, STEP) - at(head, 0.0)) / STEP for head in range(layers[layer])]
    assert any(ours) and np.argsort(ours).tolist() == np.argsort(theirs).tolist()
    np.testing.assert_allclose(ours, theirs, rtol=0.02, atol=0.02 * max(map(abs, theirs)))
    assert not torch.is_grad_enabled() or pipe.transformer.proj_out.weight.requires_grad
    assert type(pipe.scheduler).__module__.startswith("diffusers")


@pytest.fixture(scope="module")
def tiny_image() -> tuple[Any, dict[str, Any]]:
    from dit_attn import models

    pipe = models.load("tiny-image")
    pipe.set_progress_bar_config(disable=True)
    call = {**models.call_defaults("tiny-image"), "height": 32, "width": 32, "num_inference_steps": 1}
    return pipe, call


def test_a_search_on_a_stock_pipeline_gives_a_file_that_enable_takes(tiny_image: Any, tmp_path: Path) -> None:
    pipe, call = tiny_image
    hunter = HeadHunter(
        pipe, [CAPTION, (CAPTION, 9)], bright, rounds=1, per_round=2, call=call, held_out=1, controls=1, model="tiny"
    )
    found = hunter.search()
    assert len(found.heads) == 2 and set(found.checks) == {"searched", "held_out"}
    assert found.search["images"]["candidates"] == len(hunter.trials.heads)
    assert found.search["passes"]["candidates"] == 2 * len(hunter.trials.heads)  # one step, one perturbed pass
    file = found.save(tmp_path)
    assert HeadSet.load(file).to_dict() == found.to_dict()
    method = dit_attn.SoftPAG(heads=str(file))
    session = dit_attn.enable(pipe, method)
    assert session.guider is not None
    assert sum(map(len, session.guider.plan.strengths.values())) == 2
    dit_attn.disable(pipe)
    assert method.to_dict()["found_on"] == type(pipe.transformer).__name__


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"batch": 0}, "batch must be at least 1"),
        ({"held_out": -1}, "at least 0; got 4, -1, 0 and 0"),
        ({"scale": 0.0}, "scale must be above 0"),
        ({"call": {"highth": 64}}, "unknown argument of PixArtSigmaPipeline 'highth'. Did you mean 'height'"),
    ],
)
def test_a_search_that_cannot_be_is_refused(tiny_image: Any, more: dict[str, Any], words: str) -> None:
    pipe, _ = tiny_image
    with pytest.raises(DitAttnError, match=words):
        HeadHunter(pipe, ["a", "b"], bright, **more)


def test_whole_layers_are_checked_beside_the_heads_and_the_best_is_the_best_on_the_searched_pairs(
    tiny_image: Any,
) -> None:
    pipe, call = tiny_image
    hunter = HeadHunter(
        pipe, [(CAPTION, 1), (CAPTION, 2)], bright, rounds=1, per_round=1, call=call, held_out=1, layers=True, u=0.5
    )
    found = hunter.search()
    names = [f"layer {n}" for n in range(len(found.layers))]
    for checks in found.checks.values():
        assert list(checks) == ["none", "round 1", *names]
        for name, (layer, count) in zip(names, found.layers.items()):
            assert checks[name]["heads"] == [[layer, head, 0.5] for head in range(count)]
    assert found.search["images"]["checks"] == 2 * (1 + len(names)) + 1  # the heads were scored on the searched pair
    best = found.search["best_layer"]
    searched, held_out = (found.checks[where] for where in ("searched", "held_out"))
    assert best["name"] == max(names, key=lambda name: searched[name]["score"]["value"])
    for where, checks in (("searched", searched), ("held_out", held_out)):
        ahead = checks["round 1"]["score"]["value"] - checks[best["name"]]["score"]["value"]
        assert best["lead"][where]["value"] == pytest.approx(ahead)


def saved(tmp_path: Path, **changes: Any) -> str:
    facts: dict[str, Any] = {"model": "m", "transformer": "FluxTransformer2DModel"}
    facts |= {"target": "identity", "joint": "joint"}
    heads = (("transformer_blocks.0.attn", 0, 0.5),)
    return str(HeadSet(**{**facts, "heads": heads, "scale": 3.0, **changes}).save(tmp_path / "heads.json"))


def test_heads_of_another_model_or_convention_are_refused_unless_forced(tmp_path: Path) -> None:
    pipe, _ = tiny_pipeline("sd3")
    file = saved(tmp_path)
    with pytest.raises(DitAttnError, match="found on FluxTransformer2DModel, and this model is SD3Transformer2DModel"):
        dit_attn.enable(pipe, dit_attn.SoftPAG(heads=file))
    dit_attn.enable(pipe, dit_attn.SoftPAG(heads=file, force=True))
    dit_attn.disable(pipe)
    file = saved(tmp_path, joint="image-rows")
    with pytest.raises(DitAttnError, match="found with joint='image-rows'"):
        dit_attn.SoftPAG(heads=file)
    assert dit_attn.SoftPAG(heads=file, joint="image-rows").heads == "transformer_blocks.0.attn:0@0.5"


def test_pushing_uploads_the_method_and_the_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    sent: dict[str, Any] = {}

    class Api:
        def create_repo(self, repo: str, **_: Any) -> None: ...

        def upload_file(self, path_or_fileobj: bytes, path_in_repo: str, **_: Any) -> str:
            sent[path_in_repo] = json.loads(path_or_fileobj)
            return "address"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert HeadSet.load(saved(tmp_path)).push_to_hub("me/heads") == "address"
    assert sent["heads.json"]["heads"] == [["transformer_blocks.0.attn", 0, 0.5]]
    method = dit_attn.Method.from_dict(sent["dit_attn_method.json"])
    assert isinstance(method, dit_attn.SoftPAG) and method.found_on == "FluxTransformer2DModel"


# -- objectives --------------------------------------------------------------------------------------------------------

CAPTION = "a large red circle at the left on white"


def drawn() -> np.ndarray:
    from dit_attn.eval.shapes_world import world

    picture = world.render_scenes([world.parse(CAPTION)], 64)  # type: ignore[list-item]
    return (picture.permute(0, 2, 3, 1).numpy() * 255).round().astype(np.uint8)


@pytest.mark.parametrize("name", ["clip-world", "drawn-world", "verifier", "verifier-whole", "style"])
def test_objectives_prefer_what_the_caption_says(name: str) -> None:
    goal = objective(name, Weights(clip="clip-world", style="a picture"))
    grey = np.full((1, 64, 64, 3), 128, dtype=np.uint8)
    right, wrong = objectives.judged(goal, [drawn(), grey], [CAPTION, CAPTION])
    assert right is not None and wrong is not None and right > wrong


def test_drawn_world_has_slopes_and_is_zero_for_the_drawn_caption() -> None:
    goal = objective("drawn-world")
    assert goal.pixels is not None and goal.judge([drawn()], [CAPTION])[0] == pytest.approx(0.0, abs=1e-5)
    picture = torch.full((1, 1, 3, 64, 64), 0.5, requires_grad=True)
    goal.pixels(picture, [CAPTION]).sum().backward()  # type: ignore[no-untyped-call]
    assert picture.grad is not None and picture.grad.abs().max() > 0
    with pytest.raises(DitAttnError, match="drawn-world draws its prompts"):
        goal.judge([drawn()], ["a cat"])


def test_fid_world_scores_a_set() -> None:
    goal = objective("fid-world")
    grey = np.full((1, 64, 64, 3), 128, dtype=np.uint8)
    own = objectives.judged(goal, [drawn(), drawn()], [CAPTION, CAPTION])
    other = objectives.judged(goal, [grey, grey], [CAPTION, CAPTION])
    assert len(own) == 1 and own[0] == pytest.approx(0.0, abs=1e-6) and other[0] is not None and other[0] < -1


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("pickscore", "needs its weights: give --weights"),
        ("hpsv2", "HPSv2"),
        ("aesthetic", "needs two things"),
        ("style", "needs its words"),
        ("beauty", "unknown objective"),
    ],
)
def test_an_objective_says_what_it_lacks(name: str, words: str) -> None:
    with pytest.raises(DitAttnError, match=words):
        objective(name)


@pytest.mark.parametrize("given", [1.0, None, ["good"], np.zeros((1, 2))], ids=["number", "nothing", "text", "table"])
def test_what_is_no_list_of_scores_is_refused(given: Any) -> None:
    with pytest.raises(dit_attn.DitAttnError, match="it must return one score an image"):
        objectives.judged(Objective("mine", lambda images, prompts: given), [drawn()], ["a"])


def test_wrong_numbers_of_scores_are_refused() -> None:
    with pytest.raises(DitAttnError, match="gave 1 scores for 2 images"):
        objectives.judged(objective(lambda images, prompts: [1.0]), [drawn(), drawn()], ["", ""])
