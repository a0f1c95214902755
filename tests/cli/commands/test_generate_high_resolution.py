"""`generate --high-resolution`: both stages, what the sidecar says of them, going on, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from dit_attn.cli import high_resolution
from dit_attn.cli.commands import generate
from dit_attn.pipelines.high_resolution.latents import FILTERS, SPACES

PROMPT = "a large red circle at the left on white"
WORDS = ("generate", "--device", "cpu", "--model", "tiny-image", "--prompt", PROMPT, "--high-resolution")
SMALL = (*WORDS, "--steps", "4", "--native-height", "32", "--native-width", "32", "-o", "out")


def sidecar(folder):
    (path,) = folder.glob("0*.json")
    return json.loads(path.read_text())


def test_the_flags_know_the_names_of_the_pipeline():
    choices = {flag.name: flag.choices for flag in high_resolution.FLAGS if flag.choices}
    assert choices == {"upscale": FILTERS, "upscale-space": SPACES}
    assert generate.GROUPS["high resolution"] is high_resolution.FLAGS


def test_it_makes_what_the_procedure_makes_and_says_how(cli, tmp_path):
    from dit_attn import InwardWindow, models
    from dit_attn.pipelines import HighResolution

    outcome = cli(*SMALL, "--height", "64", "--width", "48", "--sigma", "0.6")
    assert outcome.code == 0, outcome.err
    found = sidecar(tmp_path / "out")
    assert found["size"] == [64, 48] and found["high_resolution"] == {"native": [32, 32], "sigma": 0.6}
    assert found["methods"][0]["method"] == "inward-window" and found["methods"][0]["native"] == [8, 8]
    assert found["summary"]["sparse_calls"] > 0 and "sparse calls" in outcome.out
    stages = found["stages"]
    assert list(stages["seconds"]) == ["native pass", "upscale", "encode", "denoise", "decode"]
    assert 0 < stages["sigma"] <= 0.6 and 0 < stages["steps"] < 4
    assert (tmp_path / "out" / stages["native_pass"]).is_file()
    pipe = models.load("tiny-image")
    call = {**models.call_defaults("tiny-image"), "num_inference_steps": 4, "height": 64, "width": 48}
    make = HighResolution(pipe, InwardWindow(native=(8, 8)), sigma=0.6)
    made = make(PROMPT, **call, native=(32, 32), generator=torch.Generator().manual_seed(42), output_type="np")
    expected = (made.images[0].clip(0.0, 1.0) * 255).round()
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out" / found["file"])), expected)


def test_it_goes_on_from_the_native_pass(cli, tmp_path, monkeypatch):
    from dit_attn.pipelines import HighResolution

    size = ("--height", "64", "--width", "64")
    assert cli(*SMALL, *size, "--seed", "3").code == 0
    (file,) = (tmp_path / "out/native").iterdir()
    first = sidecar(tmp_path / "out")
    (tmp_path / "out" / first["file"]).unlink()

    def again(*args, **kwargs):
        raise AssertionError("the native pass is made again")

    monkeypatch.setattr(HighResolution, "native_pass", again)
    assert cli(*SMALL, *size, "--seed", "3", "--resume").code == 0
    second = sidecar(tmp_path / "out")
    assert second["sha256"] == first["sha256"] and "native pass" not in second["stages"]["seconds"]
    assert cli(*SMALL, *size, "--seed", "3", "--resume", "--sigma", "0.7", "--dense", "-o", "other").code == 1
    file.write_bytes(file.read_bytes()[:100])  # cut short: made again
    (tmp_path / "out" / first["file"]).unlink()
    outcome = cli(*SMALL, *size, "--seed", "3", "--resume")
    assert outcome.code == 1 and "the native pass is made again" in outcome.err


def test_the_second_stage_takes_other_methods_and_none(cli, tmp_path):
    size = ("--height", "64", "--width", "64", "--upscale-space", "latent", "--upscale", "bilinear")
    assert cli(*SMALL, *size, "--method", "block-sparse", "-o", "a").code == 0
    assert sidecar(tmp_path / "a")["methods"][0]["method"] == "block-sparse"
    assert cli(*SMALL, *size, "--dense", "-o", "b").code == 0
    found = sidecar(tmp_path / "b")
    assert found["methods"] == [] and found["summary"] is None and "encode" not in found["stages"]["seconds"]
    assert found["high_resolution"] == {"native": [32, 32], "upscale": "bilinear", "space": "latent"}


def test_a_dry_run_says_the_stages(cli, tmp_path):
    outcome = cli(*SMALL, "--height", "64", "--width", "64", "--dry-run")
    assert outcome.code == 0 and "native pass of 32 x 32 pixels" in outcome.out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("--height", "96", "--width", "256"), ["height must be at least the native 128", "96"]),
        (("--height", "256"), ["needs the size of the result", "--width"]),
        (("--height", "258", "--width", "256"), ["multiple of 4", "258", "256"]),
        (("--height", "256", "--width", "256", "--steps", "0"), ["--steps", "at least 1"]),
        (("--height", "256", "--width", "256", "--sigma", "1.5"), ["--sigma", "between 0 and 1"]),
        (("--height", "256", "--width", "256", "--sigma", "0"), ["--sigma must be above 0"]),
        (("--height", "256", "--width", "256", "--steps", "2", "--sigma", "0.1"), ["sigma 0.1 leaves no step"]),
        (("--height", "256", "--width", "256", "--native-height", "64"), ["--native-width", "come together"]),
        (("--height", "256", "--width", "256", "--dense", "--method", "inward-window"), ["--dense", "--method"]),
        (("--height", "256", "--width", "256", "--compile"), ["--compile", "--high-resolution"]),
        (("--height", "256", "--width", "256", "--upscale", "lanczos"), ["'lanczos'", "bicubic"]),
    ],
)
def test_it_refuses_before_weights_are_loaded(cli, words, parts, tmp_path, monkeypatch):
    from dit_attn.cli import load_pipeline

    monkeypatch.setattr(load_pipeline, "load_pipeline", lambda *args, **kwargs: pytest.fail("weights are loaded"))
    cli(*WORDS, *words, "-o", "out").refused(*parts)
    assert not (tmp_path / "out").exists()


def test_its_flags_need_it(cli):
    cli(*WORDS[:-1], "--sigma", "0.5").refused("--sigma is for two stages", "--high-resolution")


def test_explain_says_what_the_stages_cost(cli):
    words = ("explain", "--model", "tiny-image", "--high-resolution", "--height", "512", "--width", "512")
    outcome = cli(*words, "--json")
    assert outcome.code == 0, outcome.err
    stages = json.loads(outcome.out)["stages"]
    assert [stage["name"] for stage in stages][::3] == ["native pass", "denoise"]
    assert stages[0]["tokens"] == 1024 and stages[3]["density"] < 0.1
    assert "of the time" in cli(*words, "--dense", "--native-height", "64", "--native-width", "64").out
    cli(*words[:-2]).refused("needs the size of the result", "--width")


def test_a_store_larger_than_the_memory_is_refused_before_weights_are_loaded(cli, monkeypatch):
    from dit_attn.cli import load_pipeline
    from dit_attn.pipelines.high_resolution import estimate

    monkeypatch.setattr(load_pipeline, "load_pipeline", lambda *args, **kwargs: pytest.fail("weights are loaded"))
    monkeypatch.setattr(estimate, "free_memory", lambda device: 1000)
    size = ("--height", "256", "--width", "256")
    cli(*WORDS, *size, "--method", "inward-window:override=text").refused("what the twin pass leaves", "store=fp8")
