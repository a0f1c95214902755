"""`compare` of guidance methods: competitors with other call arguments, and guidance of matched strength."""

from __future__ import annotations

import json

import pytest

from dit_attn.cli.commands.compare import match as compare_match

CAPTION = "a large red circle at the left on white"
WORDS = ("compare", "--model", "tiny-image", "--height", "64", "--width", "64", "--steps", "2", "--metrics", "none")
GUIDED = "softpag:heads=3,scale=1"


@pytest.fixture
def compare(cli):
    return lambda *words: cli(*WORDS, "--prompt", CAPTION, "--seeds", "0,1", "-o", "out", *words)


def headline(outcome):
    assert outcome.code == 0, outcome.err
    return {row["label"]: row for row in json.loads(outcome.out)["headline"]}


def test_a_competitor_may_change_the_call(compare):
    rows = headline(compare("--method", "call:guidance_scale=2.0", "--method", "call:guidance_scale=1", "--json"))
    same, other = rows["call:guidance_scale=2.0"], rows["call:guidance_scale=1"]
    assert same["equal"] == 2 and other["equal"] == 0  # 2 is the model's own scale
    assert other["call"] == {"guidance_scale": 1} and other["methods"] == []


def test_matching_without_a_method_that_guides_is_refused(compare):
    words = ("--method", "block-sparse:density=0.5,q_block=32,kv_block=32", "--match-strength")
    compare(*words).refused("--match-strength matches guidance methods, and none is compared")


def test_matched_strength_adds_the_scale_that_pushes_as_far(compare, tmp_path, monkeypatch):
    rows = headline(compare("--method", GUIDED, "--match-strength", "--json"))
    matched = next(row for label, row in rows.items() if label.endswith(f"as strong as {GUIDED}"))
    found = rows[GUIDED]
    assert found["sideways"]["value"] > 0
    assert matched["call"]["guidance_scale"] == pytest.approx(2.0 + found["parallel"]["value"], abs=0.002)
    monkeypatch.setattr(compare_match, "match_guidance_scale", None)  # what was measured is not measured again
    again = headline(compare("--method", GUIDED, "--match-strength", "--resume", "--json"))
    assert set(again) == set(rows)


def test_a_run_without_guidance_is_matched_from_scale_one(compare):
    label = f"call:guidance_scale=1 + {GUIDED}"
    rows = headline(compare("--method", label, "--match-strength", "--json"))
    assert rows[label]["parallel"] is None  # no unconditional branch ran in the compared items
    matched = next(row for name, row in rows.items() if name.endswith(f"as strong as {label}"))
    assert 1.0 <= matched["call"]["guidance_scale"] < 2.0


def test_an_argument_the_pipeline_does_not_take_is_refused(compare):
    compare("--method", "call:guidance=3").refused("guidance")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (("softpag", "heads=99"), "no layer 99"),
        (("softpag", "heads=3:9"), "has no head 9: its heads are 0 to 1"),
        (("softpag", "heads=transformer_blocks.3.attn2:0"), "cross attention"),
        (("softpag", "heads=3:-1"), "cannot be parsed"),
        (("softpag", "heads=nothing.json"), "nothing.json cannot be read"),
        (("softpag", "u=-0.5"), "softpag.u must be between 0.0 and 1.0"),
        (("softpag", "scale=-1"), "softpag.scale must be at least 0.0"),
        (("slg", "layers=6"), "no block 6: this model has blocks 0 to 5"),
        (("seg", "sigma=-2"), "seg.sigma must be at least 0.0"),
    ],
    ids=lambda value: value[1] if isinstance(value, tuple) else "",
)
def test_guidance_a_model_cannot_take_is_one_line(cli, settings, told):
    method, setting = settings
    cli("explain", "--model", "tiny-image", "--method", method, "--set", setting).refused(told)


def test_a_wrong_head_is_refused_by_generate(image):
    image("--prompt", CAPTION, "--method", "softpag", "--set", "heads=3:9").refused("has no head 9")


def test_explain_says_evaluations_and_cost_of_a_step(cli):
    words = ("explain", "--model", "tiny-image", "--method", "softpag", "--set", "heads=3:0")
    outcome = cli(*words)
    assert outcome.code == 0, outcome.err
    text = " ".join(outcome.out.split())  # long values are wrapped
    assert "1 heads in 1 layers; evaluations per step: 2.00 alone, 3.00 with CFG" in text
    assert "blocks run: x1.50 alone, x1.25 with CFG" in text  # 3 of 6 blocks are taken over
    skipped = cli("explain", "--model", "tiny-image", "--method", "stg", "--set", "mode=residual", "--set", "layers=3")
    text = " ".join(skipped.out.split())
    assert "1 blocks skipped" in text and "x1.33 alone" in text  # and the fourth is not run


def test_guidance_that_the_pipeline_drops_is_told_of(cli, flux_model):
    asked = json.dumps({"true_cfg_scale": 3, "max_sequence_length": 16})
    words = ("--prompt", CAPTION, "--height", "32", "--width", "32", "--steps", "2", "--metrics", "none", "--no-maps")
    outcome = cli(
        "compare", "--model", str(flux_model), *words, "--pipeline-kwargs", asked, "--method", "softpag:heads=0",
        "-o", "out", "--json",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    dense, guided = json.loads(outcome.out)["takes"]
    assert dense["warnings"] == guided["warnings"] and "true_cfg_scale 3 had no effect" in dense["warnings"][0]
    assert outcome.err.count("true_cfg_scale 3 had no effect") == 1 and "(2 of 2 items)" in outcome.err
