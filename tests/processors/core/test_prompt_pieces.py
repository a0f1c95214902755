"""Prompts are split where one thing ends and another begins."""

from __future__ import annotations

import pytest

from dit_attn.errors import DitAttnError
from dit_attn.processors.core.prompt_pieces import SPLITS, split_prompt


@pytest.mark.parametrize(
    ("prompt", "clauses", "release"),
    [
        ("A is red, and B, and C.", ["A is red", "B", "C"], ["A is red", "B", "C."]),
        ("a circle and a cross on white; night", ["a circle", "a cross on white", "night"], None),
        ("<img><|image_1|></img>, go red, and add a dog", ["go red", "add a dog"], ["go red", "add a dog"]),
        ("put <img><|image_2|></img> on a table", ["put", "on a table"], ["put", "a table"]),
        ("Make it red. Then, remove the sand!\nAlso a candy", ["Make it red", "remove the sand", "a candy"], None),
        ("red, white, blue", ["red", "white", "blue"], ["red", "", ""]),
        ("size 1.5 x 2", ["size 1.5 x 2"], ["size 1.5 x 2"]),
    ],
)
def test_the_pieces_of_a_prompt(prompt: str, clauses: list[str], release: list[str] | None) -> None:
    found = {how: [prompt[a:b] for a, b in split_prompt(prompt, how)] for how in SPLITS}
    assert found["clauses"] == clauses
    if release is not None:
        assert found["release"] == [piece for piece in release if piece]


def test_a_prompt_without_words_is_an_error() -> None:
    with pytest.raises(DitAttnError, match="has no piece with a letter"):
        split_prompt(" ,;. ")
