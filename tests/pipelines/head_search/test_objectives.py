"""Objectives prefer what the caption says, and say what they lack."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from dit_attn.errors import DitAttnError
from dit_attn.pipelines.head_search import Objective, ScorerOptions, make_objective
from dit_attn.pipelines.head_search.objective import score_images

CAPTION = "a large red circle at the left on white"


def drawn() -> np.ndarray:
    from dit_attn.eval.shapes_world import world

    image = world.render_scenes([world.parse(CAPTION)], 64)  # type: ignore[list-item]
    return (image.permute(0, 2, 3, 1).numpy() * 255).round().astype(np.uint8)


@pytest.mark.parametrize("name", ["clip-world", "drawn-world", "verifier", "verifier-whole", "style"])
def test_objectives_prefer_what_the_caption_says(name: str) -> None:
    objective = make_objective(name, ScorerOptions(clip="clip-world", style="a picture"))
    gray = np.full((1, 64, 64, 3), 128, dtype=np.uint8)
    right, wrong = score_images(objective, [drawn(), gray], [CAPTION, CAPTION])
    assert right is not None and wrong is not None and right > wrong


def test_drawn_world_has_slopes_and_is_zero_for_the_drawn_caption() -> None:
    objective = make_objective("drawn-world")
    assert objective.pixels is not None and objective.score([drawn()], [CAPTION])[0] == pytest.approx(0.0, abs=1e-5)
    image = torch.full((1, 1, 3, 64, 64), 0.5, requires_grad=True)
    objective.pixels(image, [CAPTION]).sum().backward()  # type: ignore[no-untyped-call]
    assert image.grad is not None and image.grad.abs().max() > 0
    with pytest.raises(DitAttnError, match="drawn-world draws its prompts"):
        objective.score([drawn()], ["a cat"])


def test_fid_world_scores_a_set() -> None:
    objective = make_objective("fid-world")
    gray = np.full((1, 64, 64, 3), 128, dtype=np.uint8)
    own = score_images(objective, [drawn(), drawn()], [CAPTION, CAPTION])
    other = score_images(objective, [gray, gray], [CAPTION, CAPTION])
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
        make_objective(name)


@pytest.mark.parametrize("given", [1.0, None, ["good"], np.zeros((1, 2))], ids=["number", "nothing", "text", "table"])
def test_what_is_no_list_of_scores_is_refused(given: Any) -> None:
    with pytest.raises(DitAttnError, match="it must return one score an image"):
        score_images(Objective("mine", lambda images, prompts: given), [drawn()], ["a"])


def test_wrong_numbers_of_scores_are_refused() -> None:
    with pytest.raises(DitAttnError, match="gave 1 scores for 2 images"):
        score_images(make_objective(lambda images, prompts: [1.0]), [drawn(), drawn()], ["", ""])
