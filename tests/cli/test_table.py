"""Tables: aligned, plain on pipes, never cut on narrow terminals."""

from __future__ import annotations

import io

import pytest

from dit_attn.cli import progress
from dit_attn.cli.table import Table, fields, show

ROWS = [("block-sparse:density=0.25 [x]", "1.25 [1.00, 1.50]", "a note that is longer than the rest of the line")]
TABLE = Table(("variant", ">speed-up", "note"), [*ROWS, ("dense", "-", "")], "title", folded=("note",))


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_on_a_pipe_a_table_is_plain_and_one_line_per_row():
    out = io.StringIO()
    show("before", TABLE, file=out)
    assert out.getvalue().splitlines() == [
        "before",
        "title",
        "variant                                 speed-up  note",
        "block-sparse:density=0.25 [x]  1.25 [1.00, 1.50]  a note that is longer than the rest of the line",
        "dense                                          -",
    ]


@pytest.mark.parametrize("width", [10, 40, 60, 80, 200])
def test_on_a_terminal_nothing_is_lost_at_any_width(width, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("NO_COLOR", "1")
    out = Terminal()
    show(TABLE, file=out)
    text = out.getvalue()
    assert all(cell in text for cell in ROWS[0][:2]) and "…" not in text
    for word in ROWS[0][2].split():
        assert word in text


def test_on_a_terminal_long_text_is_folded_to_its_width(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert max(map(len, TABLE.text(80).splitlines()[2:])) <= 80 < max(map(len, TABLE.text().splitlines()))


def test_markup_in_a_cell_is_text():
    assert "[bold]x[/bold] :smile:" in Table(("a",), [("[bold]x[/bold] :smile:",)]).text()


def test_without_titles_there_is_no_line_for_them():
    assert Table(("", ""), [("a", "b")]).text() == "a  b"


def test_columns_that_no_row_uses_can_be_left_out():
    table = Table(("a", ">b", "c"), [("1", "", "3"), ("4", "")]).without_empty()
    assert table.text().splitlines() == ["a  c", "1  3", "4"]


def test_fields_are_names_and_values_that_never_wrap(monkeypatch):
    long = "/a/" + "long/" * 60 + "path with spaces"
    monkeypatch.setenv("COLUMNS", "40")
    out = Terminal()
    show(fields({"file": long, "use": 3}), file=out)
    assert out.getvalue().splitlines() == [f"file      {long}", "use       3"]


def test_progress_is_shown_on_terminals_only(monkeypatch, capsys):
    with progress.progress_bar(3, "items") as bar:
        bar.update()
    progress.StatusLine()("working")
    assert capsys.readouterr() == ("", "")
    terminal = Terminal()
    monkeypatch.setattr(progress.sys, "stderr", terminal)
    with progress.progress_bar(3, "items") as bar:
        bar.update()
    progress.StatusLine()("working")
    assert "items" in terminal.getvalue() and "working" in terminal.getvalue()
    before = terminal.getvalue()
    with progress.progress_bar(3, "items", shown=False), progress.progress_bar(1, "items"):
        progress.StatusLine(shown=False)("working")
    assert terminal.getvalue() == before
