"""``--help``: grouped, every flag with its default, readable at 80 columns, the same names as in the code."""

from __future__ import annotations

import argparse
import importlib
import re

import pytest

from dit_attn.cli import COMMANDS, main
from dit_attn.cli.parser import Parser

GROUPS = {
    "generate": ["model", "methods", "prompts", "size", "sampling", "high resolution", "output", "run", "workers"],
    "edit": ["model", "methods", "instructions", "size", "sampling", "output", "run", "workers"],
    "models": ["output"],
    "methods": ["method", "output"],
    "explain": ["model", "methods", "size", "sampling", "high resolution", "output", "run"],
    "doctor": ["output"],
    "demo": ["output", "run"],
    "train": ["model", "training", "evaluation", "output", "run"],
    "compare": ["model", "methods", "prompts", "comparison", "size", "sampling", "output", "run", "workers"],
    "inspect": ["model", "methods", "prompts", "measurements", "size", "sampling", "output", "run"],
    "calibrate": ["model", "methods", "prompts", "calibration", "size", "sampling", "output", "run", "workers"],
    "finetune": ["what", "model", "methods", "examples", "training", "merge", "output", "run", "workers"],
    "search": [
        *("model", "methods", "search", "guidance", "objectives", "prompts", "size", "sampling", "output", "run"),
        "workers",
    ],
    "anomaly": ["job", "model", "data", "training", "generation", "benchmark", "output", "run", "workers"],
    "eval": ["files", "metrics", "export", "output", "run"],
    "merge": ["parts", "output"],
    "bench": ["what", "kernels", "operators", "model", "methods", "output", "run"],
    "completion": ["shell"],
}
TAKE_METHODS = ("generate", "edit", "explain", "compare", "inspect", "calibrate", "finetune", "search", "bench")


def parser_of(command):
    parser = Parser(prog=f"dit-attn {command}")
    importlib.import_module(f"dit_attn.cli.commands.{COMMANDS[command].module}").add_arguments(parser)
    return parser


def test_every_command_is_looked_at():
    assert list(GROUPS) == list(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_flags_are_in_titled_groups(command):
    groups = [group for group in parser_of(command)._action_groups if group._group_actions]
    assert [group.title for group in groups[1:]] == GROUPS[command]
    assert [action.option_strings for action in groups[0]._group_actions] == [["-h", "--help"]]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_says_what_it_does_and_its_default(command):
    for action in parser_of(command)._actions[1:]:
        text = str(action.help)
        if action.help is argparse.SUPPRESS:  # taken to be refused with the reason
            assert action.dest == "shard"
            continue
        assert re.search(r"\((default: .+|required)\)$", text), (action.dest, text)
        assert action.default in (argparse.SUPPRESS, None), action.dest  # what is not given leaves no trace
        if action.dest in ("height", "width"):
            assert "pixels" in text


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_in_80_columns_and_cuts_no_word(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].startswith(f"usage: dit-attn {command}")
    assert not [line for line in lines if line.endswith("-")]


def test_the_list_of_commands_fits_in_80_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    for name, command in COMMANDS.items():
        assert any(re.match(rf"    {name}\s+{re.escape(command.help[:30])}", line) for line in lines), name


@pytest.mark.parametrize("command", COMMANDS)
def test_method_and_set_are_in_every_command_that_takes_methods(command):
    flags = {flag for action in parser_of(command)._actions for flag in action.option_strings}
    assert ({"--method", "--set"} <= flags) == (command in TAKE_METHODS)


def test_names_in_the_help_are_those_of_the_code():
    from dit_attn.cli.commands.search import command
    from dit_attn.eval.extractors import CLIP_DEFAULT
    from dit_attn.pipelines.head_search.config import STRATEGY_NAMES
    from dit_attn.pipelines.head_search.objectives import OBJECTIVES

    assert set(command.OBJECTIVES) == set(OBJECTIVES) and set(command.STRATEGIES) == set(STRATEGY_NAMES)
    for name in ("compare", "eval", "search"):
        (clip,) = (action.help for action in parser_of(name)._actions if action.dest == "clip")
        assert f"(default: {CLIP_DEFAULT})" in clip
