"""A search on a stock pipeline gives a file that ``enable`` reads, with checks against baselines."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dit_attn
from dit_attn.errors import DitAttnError
from dit_attn.pipelines.head_search import HeadHunter, HeadSet, SearchConfig

CAPTION = "a large red circle at the left on white"


def bright(images: Sequence[np.ndarray], prompts: Sequence[str]) -> list[float]:
    return [float(image.mean()) for image in images]


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
        pipe,
        [CAPTION, (CAPTION, 9)],
        bright,
        SearchConfig(rounds=1, per_round=2, held_out=1, controls=1),
        call=call,
        model="tiny",
    )
    found = hunter.search()
    assert len(found.heads) == 2 and set(found.checks) == {"searched", "held_out"}
    assert found.search["images"]["candidates"] == len(hunter.evaluator.heads)
    assert found.search["passes"]["candidates"] == 2 * len(hunter.evaluator.heads)  # one step, one perturbed pass
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
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"held_out": -1}, "held_out must be at least 0, got -1"),
        ({"controls": -1}, "controls must be at least 0, got -1"),
        ({"tune": -1}, "tune must be at least 0, got -1"),
        ({"scale": 0.0}, "scale must be above 0"),
        ({"held_out": 2}, "2 pairs less 2 held out leave none to search on"),
        ({"call": {"highth": 64}}, "unknown argument of PixArtSigmaPipeline 'highth'. Did you mean 'height'"),
    ],
)
def test_a_search_that_cannot_be_is_refused(tiny_image: Any, more: dict[str, Any], words: str) -> None:
    pipe, _ = tiny_image
    with pytest.raises(DitAttnError, match=words):
        call = more.get("call")
        HeadHunter(
            pipe,
            ["a", "b"],
            bright,
            SearchConfig(**{name: value for name, value in more.items() if name != "call"}),
            call=call,
        )


def test_full_layers_are_checked_too_and_the_best_is_the_best_on_the_searched_pairs(
    tiny_image: Any,
) -> None:
    pipe, call = tiny_image
    hunter = HeadHunter(
        pipe,
        [(CAPTION, 1), (CAPTION, 2)],
        bright,
        SearchConfig(rounds=1, per_round=1, held_out=1, layers=True, u=0.5),
        call=call,
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
