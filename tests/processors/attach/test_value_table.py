"""Names and values as lines and as a table of a notebook, and the settings of a method that are shown."""

from __future__ import annotations

import os
import shutil
import sys
from html.parser import HTMLParser

import pytest

import dit_attn
from dit_attn.processors.attach.value_table import html_table, method_text, percent, text_table

WORDS = "one two three four five six"


def test_a_long_value_goes_on_below_its_beginning() -> None:
    assert text_table([("name", WORDS), ("other", "x")], label=6, width=22) == (
        "name   one two three\n       four five six\nother  x"
    )
    assert text_table([("name", "one\ntwo"), ("none", "")], label=6, width=22) == "name   one\n       two\nnone"


def test_a_word_that_is_longer_than_the_line_stays_a_word_to_copy() -> None:
    path = "transformer_blocks.0.attn1-" * 4
    assert path in text_table([("worst", f"0.1 {path}")], label=6, width=40)


@pytest.mark.parametrize(("columns", "longest"), [(60, 60), (300, 100), (1, 40)])
def test_lines_are_as_wide_as_the_terminal_and_at_most_100_columns(
    columns: int, longest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "get_terminal_size", lambda fallback: os.terminal_size((columns, 24)))
    assert max(len(line) for line in text_table([("name", "a " * 300)]).splitlines()) > 98  # not a terminal
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    widths = [len(line) for line in text_table([("name", "a " * 300)]).splitlines()]
    assert longest - 2 <= max(widths) <= longest


class Cells(HTMLParser):
    """The texts of a page, and its tags."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.tags: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.add(tag)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_the_table_of_a_notebook_is_escaped_and_names_no_color() -> None:
    page = html_table([("guidance", "<b>|c - u|</b> & more"), ("<i>", "x")])
    cells = Cells(page)
    assert cells.texts == ["guidance", "<b>|c - u|</b> & more", "<i>", "x"]
    assert cells.tags == {"table", "tbody", "tr", "th", "td"}
    assert "#" not in page and "rgb" not in page and "color:inherit" in page  # right in light and in dark


def test_settings_that_are_the_defaults_are_not_shown() -> None:
    assert method_text(dit_attn.ReTtention().to_dict()) == "re-ttention"
    assert method_text(dit_attn.BlockSparse(density=0.5, dense_layers=(0, 1)).to_dict()) == (
        "block-sparse(dense_layers=[0, 1], density=0.5)"
    )
    assert method_text(dit_attn.BlockSparse(top_p=0.9).to_dict()) == "block-sparse(top_p=0.9)"
    assert method_text({"method": "block-sparse", "density": 0.25}, ("density",)) == "block-sparse(density=0.25)"
    assert method_text({"method": "of another package", "a": 1}) == "of another package(a=1)"


def test_shares_are_printed_in_percent() -> None:
    assert (percent(0.25), percent(1.0), percent(None)) == ("25.0 %", "100.0 %", "-")
