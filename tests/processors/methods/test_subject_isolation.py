"""Isolation of subjects: the definition in float64, soft and shared regions, prompts of a pipeline, bad input."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

import dit_attn
from dit_attn import DitAttnError, SubjectIsolation
from dit_attn.processors.core.regions import barriers
from tests._support.core_calls import GRID, TEXT, Dispatched, host_run, random_args
from tests._support.prompted_pipelines import pipeline_of
from tests._support.recorded_calls import reference, requests, weights
from tests.processors.attach.prompt_spans.prompted_cases import CASES

LEFT, RIGHT = [0.0, 0.0, 0.5, 1.0], [0.5, 0.0, 1.0, 0.6]
TWO = ({"piece": "a cube", "box": LEFT}, {"piece": "a ball", "box": RIGHT})
WORDS = {"a cube": (2, 3), "a ball": (5, 6, 7), "the cat": (7, 9)}


def dispatched(method: SubjectIsolation, dtype: torch.dtype = torch.float64) -> Dispatched:
    run, layer = host_run([method])

    def find(call: Any, piece: str) -> torch.Tensor:
        out = torch.zeros(call.q.shape[0], call.k.shape[1], dtype=torch.bool)
        out[1, list(WORDS[piece])] = True
        return out

    run.find_piece = find  # type: ignore[method-assign]
    args = random_args()
    return Dispatched(run, layer, replace(args, q=args.q.to(dtype), k=args.k.to(dtype), v=args.v.to(dtype)))


def members(box: list[float]) -> list[int]:
    """Tokens of the sequence whose center is in a box."""
    t, h, w = GRID
    return [
        TEXT + (f * h + y) * w + x
        for f in range(t) for y in range(h) for x in range(w)
        if box[0] < (x + 0.5) / w < box[2] and box[1] < (y + 0.5) / h < box[3]
    ]  # fmt: skip


def definition(subjects: Any, value: float, text: bool, image: bool) -> torch.Tensor:
    """(2, 1, S, S): a row that has subjects is barred from what belongs to others and to none of its own."""
    seq_len = TEXT + math.prod(GRID)
    bias = torch.zeros(2, 1, seq_len, seq_len, dtype=torch.float64)
    rows = [set(members(one["box"])) for one in subjects]
    words = [set(WORDS[one["piece"]]) for one in subjects]
    for row in range(TEXT, seq_len):
        own = [at for at, region in enumerate(rows) if row in region]
        if not own:
            continue
        for active, owned, batch in ((text, words, slice(1, 2)), (image, rows, slice(0, 2))):
            mine = set().union(*(owned[at] for at in own))
            other = set().union(*owned) - mine
            bias[batch, 0, row, sorted(other) if active else []] = value
    return bias


THREE = (*TWO, {"piece": "the cat", "box": [0.25, 0.25, 0.75, 0.5]})


@pytest.mark.parametrize(
    ("subjects", "settings"),
    [
        (TWO, {}),
        (TWO, {"isolate_image": True, "isolate_text": False}),
        (TWO, {"isolate_image": True, "strength": 2.5}),
        (THREE, {"isolate_image": True, "overlap": "share"}),
    ],
    ids=["words", "regions", "both, soft", "shared tokens and words"],
)
def test_isolation_is_its_definition_in_float64(subjects: Any, settings: dict[str, Any]) -> None:
    method = SubjectIsolation(subjects=subjects, **settings)
    done = dispatched(method)
    value = -math.inf if method.strength == "hard" else -float(method.strength)
    bias = definition(subjects, value, method.isolate_text, method.isolate_image)
    assert bias.any() and done.stock_calls == 0
    torch.testing.assert_close(done.out, reference(done.call, done.request, bias), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("settings", [{"subjects": ()}, {"subjects": TWO[:1]}, {"subjects": TWO, "strength": 0.0},
                                      {"subjects": TWO, "start": 1}, {"subjects": TWO, "stop": 0}])  # fmt: skip
def test_nothing_to_isolate_is_stock_attention(settings: dict[str, Any]) -> None:
    done = dispatched(SubjectIsolation(isolate_image=True, **settings), torch.float32)
    assert done.stock_calls == 1 and not done.request.biases


def test_barriers_are_none_for_a_single_subject() -> None:
    one = torch.ones(1, 1, 4, dtype=torch.bool)
    assert not list(barriers(one, one))


WITHOUT = tuple({"piece": one["piece"]} for one in TWO)


def searched(localized: bool, **settings: Any) -> tuple[Any, list[Dispatched]]:
    """A run of four steps whose picture attends to the words of its left and right half, or to anything."""
    run, layer = host_run([SubjectIsolation(subjects=WITHOUT, find_steps=2, **settings)])
    places = {piece: [at for at in WORDS[piece] if at != 7] for piece in ("a cube", "a ball")}

    def find(call: Any, piece: str) -> torch.Tensor:
        out = torch.zeros(call.q.shape[0], call.k.shape[1], dtype=torch.bool)
        out[:, places[piece]] = True
        return out

    run.find_piece = find  # type: ignore[method-assign]
    args = random_args()
    if localized:
        for channel, (piece, box) in enumerate((("a cube", LEFT), ("a ball", [0.6, 0.0, 1.0, 1.0]))):
            args.q[:, members(box), :, channel] += 6.0
            args.k[:, places[piece], :, channel] += 6.0
    run.clock.total, done = 4, []
    for step in range(4):
        run.clock.step = step
        run.begin_call(2)
        done.append(Dispatched(run, layer, args))
    return run.reports["isolation"], done


def test_regions_that_are_not_given_are_found_in_the_attention_to_the_words() -> None:
    report, done = searched(True)
    assert [bool(each.request.biases) for each in done] == [False, False, True, True]
    assert [each.stock_calls for each in done] == [1, 1, 0, 0]
    assert all(one.used and one.quality > 0.9 for one in report.found) and not report.warnings
    boxes = {one.piece: one.box for one in report.found}
    assert boxes["a cube"][0] == 0.0 and boxes["a cube"][2] < 0.6 and boxes["a ball"][0] > 0.5
    assert "found with quality" in str(report)


def test_regions_that_are_not_reliable_are_refused_and_the_run_goes_on_as_it_is() -> None:
    report, done = searched(False, min_quality=0.9)
    assert all(each.stock_calls == 1 and not each.request.biases for each in done)
    assert report.warnings and "ran without isolation; give it a box" in report.warnings[0]


def test_the_leakage_is_the_mean_attention_of_regions_to_words_and_regions() -> None:
    method = SubjectIsolation(subjects=TWO, strength=0.0, observe=True)
    run, layer = host_run([method], rows=1)
    run.find_piece = lambda call, piece: torch.isin(  # type: ignore[method-assign]
        torch.arange(call.k.shape[1]), torch.tensor(WORDS[piece])
    ).expand(call.q.shape[0], -1)
    done = Dispatched(run, layer, random_args())
    assert done.stock_calls == 1 and done.call is not None
    report = run.reports["isolation"]
    shares = weights(done.call, done.request)[0][: len(done.call.branches)].mean((0, 1))
    for i, one in enumerate(TWO):
        for j, other in enumerate(TWO):
            rows = shares[members(one["box"])]
            assert report.words[i][j] == pytest.approx(float(rows[:, WORDS[other["piece"]]].sum(-1).mean()), abs=1e-5)
            assert report.regions[i][j] == pytest.approx(float(rows[:, members(other["box"])].sum(-1).mean()), abs=1e-5)
    assert "attends to the words of all subjects by" in str(report) and report.figures()["found"] == []


def test_batches_of_prompts_have_their_own_words_barred_in_the_rows_that_they_condition() -> None:
    pipe, kwargs = pipeline_of(CASES["sd3"])
    subjects = [{"piece": "red cube", "box": LEFT}, {"piece": "ball", "box": RIGHT}]
    dit_attn.enable(pipe, SubjectIsolation(subjects=subjects))
    prompts = ["a red cube and a ball", "a small house"]
    with requests() as seen:
        pipe(**{**kwargs, "prompt": prompts}, num_inference_steps=1, output_type="latent")
    call, request, _ = seen[0]
    assert call.branches == ("uncond", "uncond", "cond", "cond") and call.samples == (0, 1, 0, 1)
    bias = request.bias(slice(0, call.q.shape[1]))
    assert bias is not None and len(bias.k) == 4
    assert [bool(row.any()) for row in bias.q @ bias.k.mT] == [False, False, True, False]
    dit_attn.disable(pipe)


def test_a_piece_that_no_prompt_has_is_an_error_of_one_line() -> None:
    pipe, kwargs = pipeline_of(CASES["sd3"])
    dit_attn.enable(pipe, SubjectIsolation(subjects=TWO))
    with pytest.raises(DitAttnError, match="the piece 'a cube' is in no prompt of this run"):
        pipe(**{**kwargs, "prompt": "a small house"}, num_inference_steps=1, output_type="latent")


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"subjects": [{"piece": "a", "box": LEFT}, {"piece": "b", "box": LEFT}]}, "the boxes of 'a' and 'b' overlap"),
        ({"subjects": TWO, "strength": -1.0}, "strength must be hard, or at least 0"),
        ({"subjects": TWO, "strength": "soft"}, "strength must be"),
        ({"subjects": 3}, "isolation.subjects must be a list"),
        ({"overlap": "both"}, "unknown value of isolation.overlap"),
    ],
)
def test_bad_settings_are_one_line(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(DitAttnError, match=problem) as raised:
        SubjectIsolation(**settings)
    assert "\n" not in str(raised.value)


def test_settings_with_subjects_round_trip_and_paste_back() -> None:
    method = SubjectIsolation(subjects=[*TWO[:1], {"piece": "b", "mask": torch.ones(3, 4)}], overlap="share")
    assert dit_attn.Method.from_dict(method.to_dict()) == method
    assert eval(repr(method), {"SubjectIsolation": SubjectIsolation}) == method
    assert SubjectIsolation(isolate_text=False, isolate_image=True).sites == ("self",)
