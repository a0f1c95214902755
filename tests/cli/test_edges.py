"""Inputs at the edge: nested, huge, long or of the wrong type, each is one short line and exit code 2."""

from __future__ import annotations

import json
import shutil

import pytest

from dit_attn.cli import load_pipeline

PROMPT = ("--prompt", "a red circle")
MODEL = ("--model", "tiny-image")
LOAD = load_pipeline.load_pipeline
COMPARE = ("compare", *MODEL, *PROMPT, "--steps", "1", "--metrics", "none", "-o", "out")


@pytest.fixture(autouse=True)
def no_weights(monkeypatch):
    """Loading weights fails the test: everything here is found before."""

    def loaded(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(load_pipeline, "load_pipeline", loaded)


def refused(outcome, tmp_path, *parts):
    outcome.refused(*parts)
    assert len(outcome.err) < 800 and "unexpected" not in outcome.err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("--method", "block-sparse", "--method", "re-ttention"), ["cannot run together"]),
        (("--method", "softpag", "--set", "heads=/nope"), ["'/nope'", "transformer_blocks.0.attn1"]),
        (("--method", "softpag", "--set", "heads=nope.json"), ["nope.json", "cannot be read"]),
        (("--method", "softpag", "--set", "heads=~nosuch/x.json"), ["no such home"]),
        (("--method", "slg", "--set", "layers=999"), ["no block 999", "0 to 5"]),
        (("--method", "block-sparse", "--set", "dense_layers=6"), ["layer 6", "0 to 5"]),
        (("--method", "x" * 5000), ["unknown method 'xxx"]),
        (("--method", "block-sparse", "--set", f"keep={'x' * 5000}"), ["block-sparse.keep"]),
        (("--method", "softpag", "--set", "scale=1e999"), ["softpag.scale"]),
        (("--output", "~nosuch/x"), ["--output", "no such home"]),
        (("--output", "x" * 300), ["--output", "too long"]),
        (("--config", "~nosuch/x"), ["--config", "no such home"]),
        (("--pipeline-kwargs", "[" * 100_000), ["--pipeline-kwargs is not JSON", "nested too deeply"]),
        (("--pipeline-kwargs", '{"height": ' + "9" * 5000 + "}"), ["too many digits"]),
        (("--steps", "9" * 400), ["--steps"]),
        (("--guidance-scale", "9" * 400), ["--guidance-scale"]),
        (("--prompt", "\udcff"), ["not UTF-8"]),
        (("--revision", "x" * 5000), ["--revision"]),
    ],
    ids=lambda value: str(value[0])[:20] + str(value[-1])[:40] if isinstance(value, tuple) else "",
)
@pytest.mark.parametrize("dry", [(), ("--dry-run",)], ids=["run", "dry"])
def test_generate_finds_it_before_weights_or_a_folder(cli, tmp_path, words, parts, dry):
    extra = () if "--output" in words else ("-o", "out")
    refused(cli("generate", *MODEL, *PROMPT, *words, *dry, *extra), tmp_path, *parts)


@pytest.mark.parametrize("model", ["x" * 5000, "~nosuch/x", "a/" + "b" * 5000], ids=["long", "home", "hub"])
def test_a_model_that_cannot_be_is_refused(cli, tmp_path, model):
    refused(cli("generate", "--model", model, *PROMPT, "-o", "out"), tmp_path, model[:20])


def test_two_dashes_are_a_prompt(cli):
    outcome = cli("generate", *MODEL, "--prompt=--", "--dry-run")
    assert outcome.code == 0 and "'--'" in outcome.out


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("p.jsonl", "[" * 100_000, "line 1 is not JSON (nested too deeply)"),
        ("p.jsonl", '{"prompt": "a", "seed": ' + "9" * 5000 + "}", "too many digits"),
        ("p.jsonl", json.dumps([["x"] * 1000] * 1000), "line 1 must be an object"),
        ("p.jsonl", json.dumps({"prompt": ["x"] * 100_000}), "prompt in p.jsonl, line 1 must be text"),
        ("m.json", "[" * 200_000, "m.json is not JSON (nested too deeply)"),
        ("c.yaml", "[" * 50_000, "nested too deeply"),
        ("c.yaml", "model: &a [*a]", "aliases expand"),
        ("c.yaml", "model: [" + ", ".join(["x"] * 9000) + "]", "model in c.yaml must be text, got ['x'"),
        ("c.yaml", "seed: 2020-13-45", "out of range"),
    ],
    ids=lambda value: value[:30],
)
def test_a_file_at_the_edge_is_one_short_line(cli, tmp_path, name, content, words):
    (tmp_path / name).write_text(content)
    flag = {"p.jsonl": "--prompts", "m.json": "--method", "c.yaml": "--config"}[name]
    given = () if name == "p.jsonl" else PROMPT
    refused(cli("generate", *(() if name == "c.yaml" else MODEL), *given, flag, name, "-o", "out"), tmp_path, words)


@pytest.fixture
def broken_model(folder_model, tmp_path):
    """``broken_model(part, key, value)`` is a copy of the image model with one value of one JSON file replaced."""

    def change(file, key, value):
        shutil.copytree(folder_model, tmp_path / "m")
        path = tmp_path / "m" / file
        path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
        return ("--model", "./m")

    return change


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("_class_name", name) for name in ("logging", "pipelines", "__version__", "x" * 5000, "AutoencoderKL")],
        *[("transformer", value) for value in ("x", 5, [], ["diffusers"], {"a": 1}, ["diffusers", 5])],
    ],
    ids=str,
)
def test_a_model_index_of_other_types_is_refused(cli, tmp_path, broken_model, key, value):
    model = broken_model("model_index.json", key, value)
    words = "needs the pipeline" if key == "_class_name" else "transformer must be a pair"
    refused(cli("generate", *model, *PROMPT, "-o", "out"), tmp_path, words)


@pytest.mark.parametrize(("key", "value"), [("patch_size", 0), ("attention_head_dim", 0), ("num_layers", "x")])
def test_a_configuration_that_cannot_be_built_is_refused(cli, monkeypatch, broken_model, key, value):
    monkeypatch.setattr(load_pipeline, "load_pipeline", LOAD)  # loading says what is damaged
    model = broken_model("transformer/config.json", key, value)
    cli("generate", *model, *PROMPT, "-o", "out").refused("cannot be loaded")


@pytest.mark.parametrize(
    ("call", "parts"),
    [
        ("num_inference_steps=0", ["num_inference_steps in call must be at least 1, got 0"]),
        ("guidance_scale=.nan", ["guidance_scale in call must be a number"]),
        ("guidance_scale=abc", ["guidance_scale in call must be a number, got 'abc'"]),
        ("guidance_scale=[1", ["call:guidance_scale=[1", "line 1 is not YAML"]),
        ("height=130", ["divisible by 8"]),
        ("etaa=1", ["'etaa'", "Did you mean 'eta'"]),
        ("prompt=x", ["--prompt"]),
    ],
)
def test_arguments_of_a_variants_call_are_checked_as_those_of_generate(cli, tmp_path, call, parts):
    refused(cli(*COMPARE, "--method", f"call:{call}"), tmp_path, *parts)


@pytest.mark.parametrize("command", ["compare", "inspect", "calibrate"])
def test_layers_that_do_not_exist_are_found_before_loading_by_every_command(cli, tmp_path, command):
    method = ("--method", "block-sparse" if command == "calibrate" else "slg", "--set")
    setting = "dense_layers=99" if command == "calibrate" else "layers=99"
    extra = ("--metrics", "none") if command == "compare" else ()
    outcome = cli(command, *MODEL, *PROMPT, *method, setting, *extra, "--steps", "2", "-o", "out")
    refused(outcome, tmp_path, "99", "0 to 5")
