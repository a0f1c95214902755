"""Signs of life on a terminal, none elsewhere."""

from __future__ import annotations

import sys

from dit_attn.cli import progress
from dit_attn.cli.progress import loading_libraries


def test_a_terminal_says_that_libraries_are_being_imported_and_the_line_is_cleared(monkeypatch, capsys):
    monkeypatch.setattr(progress, "on_terminal", lambda: True)
    monkeypatch.delitem(sys.modules, "diffusers", raising=False)
    with loading_libraries():
        assert capsys.readouterr().err.endswith("loading torch and diffusers ...")
    assert capsys.readouterr().err.endswith("\033[K")


def test_pipes_json_and_libraries_that_are_there_get_no_line(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "diffusers", raising=False)
    with loading_libraries():  # standard error is no terminal here
        pass
    monkeypatch.setattr(progress, "on_terminal", lambda: True)
    with loading_libraries(shown=False):
        pass
    monkeypatch.setitem(sys.modules, "diffusers", progress)
    with loading_libraries():
        pass
    assert capsys.readouterr().err == ""
