"""`dit-attn train`: trains, resumes after Ctrl-C, and refuses bad input in one line."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from dit_attn.cli import model_source
from dit_attn.cli.commands import train
from dit_attn.cli.parser import Parser
from dit_attn.errors import DitAttnError
from dit_attn.models import loop, registry
from dit_attn.models import recipe as recipes
from dit_attn.models.recipe import Stage


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for name in ("tiny-image", "tiny-multi", "tiny-inspect", "tiny-edit"):
        chosen = recipes.RECIPES[name]
        net = replace(chosen.net, hidden=32, layers=1, heads=2)
        tiny = replace(chosen, steps=3, stages=(Stage(1.0, 16, 1, 2, 1.0),), net=net)
        monkeypatch.setitem(recipes.RECIPES, name, tiny)


def _run(*words):
    parser = Parser(prog="dit-attn train")
    train.add_arguments(parser)
    return train.run(parser.parse_args([*map(str, words)]))


def test_a_run_leaves_a_pipeline_and_a_picture(tmp_path, capsys):
    assert _run("tiny-image", "--output", tmp_path, "--device", "cpu", "--final-count", 1) == 0
    assert (tmp_path / "pipeline/model_index.json").is_file()
    assert (tmp_path / "samples.png").is_file()
    assert "pipeline written to" in capsys.readouterr().out


def test_a_model_of_several_objects_is_trained_and_scored_by_object(tmp_path, capsys):
    assert _run("tiny-multi", "--output", tmp_path, "--device", "cpu", "--final-count", 2) == 0
    out = capsys.readouterr().out
    assert "on 2 held-out captions: background " in out and "whole caption 0 %" in out
    assert re.search(r"objects of scenes of 2: present \d+ %, color given present \d+ %", out)
    with pytest.raises(DitAttnError, match="'tiny-inspect' has no tail"):
        _run("tiny-inspect", "--tail", "--output", tmp_path / "tail")


def test_a_model_of_edits_is_trained_and_scored_by_piece(tmp_path, capsys, monkeypatch):
    pytest.importorskip("torchvision")
    small = {"height": 32, "width": 32, "num_inference_steps": 2}
    for key, value in small.items():
        monkeypatch.setitem(registry.MODELS["tiny-edit"].call_defaults, key, value)
    assert _run("tiny-edit", "--output", tmp_path, "--device", "cpu", "--final-count", 4) == 0
    out = capsys.readouterr().out
    assert re.search(r"on 4 held-out edits: single edits \d+ %", out) and "untouched objects kept: not passed" in out
    assert (tmp_path / "samples.png").is_file()
    assert (tmp_path / "pipeline/model_index.json").is_file()
    assert model_source.describe(str(tmp_path / "pipeline")).defaults["height"] == 32


def test_a_model_of_edits_needs_torchvision_before_it_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DitAttnError, match="needs torchvision, which is not installed: pip install torchvision"):
        _run("tiny-edit", "--output", tmp_path)


def test_a_model_of_defects_is_scored_by_what_it_paints(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(registry.MODELS["tiny-inspect"].call_defaults, "height", 32)
    assert _run("tiny-inspect", "--output", tmp_path, "--device", "cpu", "--final-count", 1) == 0
    out = capsys.readouterr().out
    assert re.search(r"pairs of the training, 1 pieces: ratio -?\d+\.\d+, \d pass \(normal prompt", out)
    assert "gate, ratio of at least 0.7 on pairs of the training: not passed" in out
    assert (tmp_path / "samples.png").is_file()


def test_outlines_are_told_in_their_own_unit_and_shares_in_percent():
    share = {"accuracy": 0.5}
    figures = {"attributes": {"color": share}, "whole_caption": share}
    assert train._report_lines({**figures, "outlines": {"perimeter": {"mean": 1.164, "of": 2}}}, 2) == [
        "on 2 held-out captions: color 50 %, whole caption 50 %",
        "outlines, 1 is drawn: perimeter 1.16",
    ]


def test_ctrl_c_leaves_a_run_that_resume_finishes(tmp_path, monkeypatch, capsys):
    original = loop.Run.batch

    def batch(self):
        if self.step == 1:
            raise KeyboardInterrupt
        return original(self)

    monkeypatch.setattr(loop.Run, "batch", batch)
    assert _run("tiny-image", "--output", tmp_path, "--device", "cpu", "--rate", 0.3) == 130
    assert "--rate 0.3 --resume" in capsys.readouterr().err
    monkeypatch.setattr(loop.Run, "batch", original)
    assert _run("tiny-image", "--output", tmp_path, "--device", "cpu", "--resume", "--final-count", 0) == 0
    assert (tmp_path / "pipeline/model_index.json").is_file()


def test_an_existing_run_is_not_overwritten(tmp_path):
    (tmp_path / loop.CHECKPOINT).write_bytes(b"precious")
    with pytest.raises(DitAttnError, match="--resume"):
        _run("tiny-image", "--output", tmp_path)
    assert (tmp_path / loop.CHECKPOINT).read_bytes() == b"precious"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tiny-imag"], "Did you mean 'tiny-image'"),
        (["tiny-image", "--steps", "0"], "--steps must be at least 1, got '0'"),
        (["tiny-image", "--minutes", "-1"], "--minutes is -1"),
        (["tiny-image", "--rate", "0"], "--rate is 0, but must be more than 0"),
        (["tiny-image", "--minutes", "nan"], "--minutes must be a number, got 'nan'"),
        (["tiny-image", "--seed", "-1"], "--seed must be at least 0, got '-1'"),
        (["tiny-image", "--threads", "0"], "--threads must be at least 1, got '0'"),
        (["tiny-image", "--device", "tpu"], "--device 'tpu'"),
        (["tiny-image", "--device", "cuda:99"], "--device cuda:99"),
        (["tiny-image", "--resume"], "nothing to resume"),
    ],
)
def test_bad_input_is_one_line_that_names_the_value(words, message, tmp_path):
    with pytest.raises(DitAttnError, match=message) as error:
        _run(*words, "--output", tmp_path / "run")
    assert "\n" not in str(error.value)


def test_an_output_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(DitAttnError, match="file is a file; give a folder"):
        _run("tiny-image", "--output", tmp_path / "file")
