"""Where a piece occurs in a prompt, and the marks of its bounds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dit_attn.errors import DitAttnError
from dit_attn.processors.attach.prompt_spans.pieces import Bounds, occurrences


def test_a_text_stands_for_every_occurrence() -> None:
    assert occurrences("a cat, a dog and a cat", "a cat") == [(0, 5), (17, 22)]


def test_a_text_is_found_as_words_of_its_own_where_it_can_be() -> None:
    assert occurrences("a tired man in a red car", "red") == [(17, 20)]


def test_a_text_is_found_inside_of_words_where_it_never_stands_alone() -> None:
    assert occurrences("a tired man", "red") == [(4, 7)]
    assert occurrences("一只红猫和一只狗", "红猫") == [(2, 4)]


def test_scripts_without_spaces_have_no_words_to_stand_inside_of() -> None:
    assert occurrences("猫，红猫和狗", "猫") == [(0, 1), (3, 4)]


def test_occurrences_do_not_overlap() -> None:
    assert occurrences("aaaa", "aa") == [(0, 2), (2, 4)]


def test_white_space_at_the_edges_of_a_piece_is_left_out() -> None:
    assert occurrences("a  cat ", (1, 7)) == [(3, 6)]
    assert occurrences("a  cat ", " cat ") == [(3, 6)]


def test_a_text_that_does_not_occur_has_no_occurrence() -> None:
    assert occurrences("a cat", "dog") == []
    assert occurrences("a cat", "Cat") == []


@pytest.mark.parametrize(
    ("piece", "message"),
    [
        ("  ", "must have a character"),
        ((1, 2), "is white space"),
        ((3, 3), "is no range of a prompt of 5 characters"),
        ((0, 6), "is no range of a prompt of 5 characters"),
        ((-1, 2), "is no range"),
        ((0, True), "a text or \\(start, end\\)"),
        ((0, 1, 2), "a text or \\(start, end\\)"),
        (7, "a text or \\(start, end\\)"),
    ],
)
def test_what_is_no_piece_is_said_in_one_line(piece: object, message: str) -> None:
    with pytest.raises(DitAttnError, match=message) as error:
        occurrences("a cat", piece)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


@given(st.text(min_size=1, max_size=30), st.data())
def test_marks_are_found_where_they_were_put_and_can_be_taken_out(text: str, data: st.DataObject) -> None:
    bounds = Bounds([text])
    places = data.draw(st.lists(st.integers(0, len(text)), max_size=6))
    chars = {place: bounds.add("prompt", 0, place) for place in places}
    marked = bounds.insert("prompt", 0, text)
    assert bounds.remove(marked) == text
    assert all(bounds.find(marked, char) == [place] for place, char in chars.items())


def test_marks_are_none_of_the_characters_of_the_prompt() -> None:
    bounds = Bounds(["\ue000\ue001"])
    assert bounds.add("prompt", 0, 0) == "\ue002"


def test_more_bounds_than_there_are_marks_is_said() -> None:
    bounds = Bounds([])
    for at in range(6400):
        bounds.add("prompt", 0, at)
    with pytest.raises(DitAttnError, match="ask for fewer pieces"):
        bounds.add("prompt", 0, 6400)
