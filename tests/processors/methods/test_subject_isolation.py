"""Isolation of subjects: the definition in float64, soft and shared regions, prompts of a pipeline, bad input."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

import dit_attn
from dit_attn import DitAttnError, SubjectIsolation
from dit_attn.processors.methods.subject_isolation import barriers
from tests._support.core_calls import GRID, TEXT, Dispatched, host_run, random_args
from tests._support.prompted_pipelines import pipeline_of
from tests._support.recorded_calls import reference, requests
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
        ({"subjects": [{"piece": "a"}]}, "the subject 'a' has no region"),
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
