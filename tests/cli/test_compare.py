"""`compare` from end to end on the embedded image model, as small as it goes."""

from __future__ import annotations

import json

import pytest

from dit_attn.cli import compare as command
from dit_attn.cli import runner

CAPTION = "a large red circle at the left on white"
SMALL = ("--height", "64", "--width", "64", "--steps", "2", "-o", "out")
METHOD = ("--method", "block-sparse:density=0.5,dense_steps=0")


@pytest.fixture
def compare(cli):
    return lambda *words: cli("compare", "--model", "tiny-image", *words)


@pytest.fixture
def first(compare):
    return lambda *words: compare("--prompt", CAPTION, "--seeds", "0,1", *SMALL, *METHOD, *words)


def test_every_prompt_and_seed_is_made_by_everyone_with_files_and_figures(first, tmp_path):
    outcome = first("--json")
    assert outcome.code == 0, outcome.err
    results = json.loads(outcome.out)
    assert json.loads((tmp_path / "out/results.json").read_text()) == results
    assert [(t["variant"], t["seed"]) for t in results["takes"]] == [
        ("dense", 0),
        ("block-sparse:density=0.5,dense_steps=0", 0),
        ("dense", 1),
        ("block-sparse:density=0.5,dense_steps=0", 1),
    ]
    for take in results["takes"]:
        sidecar = json.loads((tmp_path / "out" / take["file"]).with_suffix(".json").read_text())
        assert sidecar["compare"] == take and sidecar["seed"] == take["seed"]
    _dense, half = results["headline"]
    assert half["attention_flops"]["value"] == pytest.approx(0.5, abs=0.1)
    assert half["speedup"]["n"] == 2 and half["methods"][0]["density"] == 0.5
    assert results["command"].startswith("dit-attn compare --model tiny-image")
    assert results["versions"]["torch"] and results["environment"]["hardware"]


def test_resume_makes_nothing_that_is_there_and_only_what_is_missing(first, tmp_path, monkeypatch):
    assert first().code == 0
    made = []
    real = runner.call_pipeline
    monkeypatch.setattr(runner, "call_pipeline", lambda pipe, job: made.append(job.index) or real(pipe, job))
    before = json.loads((tmp_path / "out/results.json").read_text())
    assert first("--resume").code == 0 and made == []
    assert json.loads((tmp_path / "out/results.json").read_text())["takes"] == before["takes"]
    (gone,) = (tmp_path / "out/block-sparse-density-0-5-dense-steps-0").glob("*s1.png")
    gone.unlink()
    assert first("--resume").code == 0
    assert [index for index in made if index == 1] == [1, 1]  # dense once more, to take the time against
    after = json.loads((tmp_path / "out/results.json").read_text())
    assert after["takes"][:3] == before["takes"][:3] and gone.is_file()
    assert after["takes"][3]["psnr"] == before["takes"][3]["psnr"]


def test_ctrl_c_keeps_what_is_finished(first, tmp_path, monkeypatch):
    real, count = runner.call_pipeline, iter(range(99))

    def interrupted(pipe, job):
        if next(count) == 4:  # after two warm-up calls and the first round
            raise KeyboardInterrupt
        return real(pipe, job)

    monkeypatch.setattr(runner, "call_pipeline", interrupted)
    outcome = first()
    assert outcome.code == 130 and "--resume" in outcome.err
    assert len(list((tmp_path / "out").glob("*/*_s0.png"))) == 2
    assert not list((tmp_path / "out").rglob(".partial-*"))
    monkeypatch.setattr(runner, "call_pipeline", real)
    assert first("--resume").code == 0


def test_a_failed_item_is_reported_and_the_others_are_there(first, tmp_path, monkeypatch):
    real, count = runner.call_pipeline, iter(range(99))

    def failing(pipe, job):
        if next(count) == 3:
            raise RuntimeError("out of luck")
        return real(pipe, job)

    monkeypatch.setattr(runner, "call_pipeline", failing)
    outcome = first()
    assert outcome.code == 1 and "out of luck" in outcome.err and "1 of 4 items failed" in outcome.err
    assert json.loads((tmp_path / "out/results.json").read_text())["headline"][1]["failed"] == 1


def test_held_out_captions_need_no_file(compare):
    outcome = compare("--held-out", "3", *METHOD, "--dry-run", "--json")
    assert outcome.code == 0, outcome.err
    plan = json.loads(outcome.out)
    assert len({item["prompt"] for item in plan["items"]}) == 3
    assert next(variant["label"] for variant in plan["variants"]) == "dense"


def test_a_configuration_file_may_name_the_competitors(compare, tmp_path):
    (tmp_path / "c.yaml").write_text("steps: 3\nmethod: [block-sparse:density=0.5, 'block-sparse:density=0.25']\n")
    plan = json.loads(compare("--prompt", CAPTION, "--config", "c.yaml", "--dry-run", "--json").out)
    assert len(plan["variants"]) == 3 and plan["items"][0]["call"]["num_inference_steps"] == 3


def test_a_method_text_is_split_at_settings_and_not_inside_lists():
    (one,) = command.split_method("block-sparse:density=0.25,keep=text,diagonal,dense_steps=2")
    assert one.settings == {"density": "0.25", "keep": "text,diagonal", "dense_steps": "2"}
    two = command.split_method("block-sparse:density=1e-1 + other:a=1")
    assert [item.name for item in two] == ["block-sparse", "other"] and two[0].settings == {"density": "1e-1"}


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ((), ("nothing to compare", "--method")),
        (("--method", "block-spars"), ("block-spars", "Did you mean")),
        (("--method", "block-sparse:density"), ("KEY=VALUE",)),
        (("--method", "block-sparse:density=2"), ("density must be between",)),
        (("--method", ":density=2"), ("names no method",)),
        ((*METHOD, *METHOD), ("two competitors",)),
        ((*METHOD, "--method", "block-sparse:dense_steps=0,density=0.5"), ("the same settings",)),
        ((*METHOD, "--seeds", "a"), ("--seeds", "whole numbers")),
        ((*METHOD, "--seeds", "1,1"), ("twice",)),
        ((*METHOD, "--seeds", "-1"), ("between 0 and",)),
        ((*METHOD, "--held-out", "2"), ("two sets of items",)),
    ],
)
def test_bad_input_costs_one_line(compare, words, parts):
    compare("--prompt", CAPTION, *words).refused(*parts)


def test_held_out_captions_are_for_embedded_models(cli, folder_model):
    cli("compare", "--model", folder_model, "--held-out", "2", *METHOD).refused("embedded models", "--prompts")
