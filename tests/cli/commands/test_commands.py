"""`models`, `explain`, `doctor` and `demo`."""

from __future__ import annotations

import functools
import json

import pytest
from PIL import Image

from dit_attn.cli.commands import demo, doctor
from dit_attn.cli.outputs import Media
from dit_attn.eval.shapes_world import world


def test_models_lists_what_can_be_used_and_says_that_weights_have_terms(cli):
    from dit_attn import models, supported

    outcome = cli("models")
    assert outcome.code == 0
    for name in (*models.available(), *supported()):
        assert name in outcome.out
    assert "licences" in outcome.out
    data = json.loads(cli("models", "--json").out)
    assert {entry["name"] for entry in data["embedded"]} == set(models.available())
    assert data["families"] == supported()


def test_every_example_of_models_can_be_generated(cli):
    for entry in json.loads(cli("models", "--json").out)["embedded"]:
        outcome = cli("generate", "--model", entry["name"], "--prompt", entry["example"], "--dry-run")
        assert outcome.code == 0


def test_explain_needs_no_weights_and_agrees_with_the_loaded_pipeline(cli, folder_model, tmp_path):
    import dit_attn
    from dit_attn import models

    data = json.loads(cli("explain", "--model", "tiny-video", "--method", "block-sparse", "--json").out)
    call = models.call_defaults("tiny-video")
    size = {key: call[key] for key in ("height", "width", "num_frames")}
    expected = dit_attn.explain(models.load("tiny-video"), "block-sparse", **size).to_dict()
    assert {key: data[key] for key in expected} == json.loads(json.dumps(expected))


def test_explain_does_without_a_pipeline_that_cannot_be_built(cli, monkeypatch):
    from diffusers import WanPipeline

    words = ("explain", "--model", "tiny-video", "--method", "block-sparse", "--json")
    expected = cli(*words).out

    @functools.wraps(WanPipeline.__init__)  # the arguments are read from its signature
    def needs_a_library(self, *args, **kwargs):
        raise ImportError("safety checker")

    monkeypatch.setattr(WanPipeline, "__init__", needs_a_library)
    outcome = cli(*words)
    assert outcome.code == 0, outcome.err
    assert outcome.out == expected


def test_explain_works_on_a_folder_whose_weights_are_missing(cli, folder_model, tmp_path):
    import shutil

    shutil.copytree(folder_model, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    outcome = cli("explain", "--model", tmp_path / "bare", "--height", "256", "--width", "256")
    assert outcome.code == 0, outcome.err
    assert "4,096 = 1 x 64 x 64" in outcome.out


def test_explain_takes_the_configuration_file_of_generate(cli, tmp_path):
    (tmp_path / "run.yaml").write_text(
        "model: tiny-image\nprompt: a\nsteps: 3\nmethod: block-sparse\nset: {density: 0.5}\n"
    )
    data = json.loads(cli("explain", "--config", "run.yaml", "--json").out)
    assert data["methods"][0]["density"] == 0.5


def test_doctor_finds_every_kernel_right_or_says_why_not(cli):
    outcome = cli("doctor", "--json")
    assert outcome.code == 0, outcome.err
    data = json.loads(outcome.out)
    on_cpu = {check["backend"]: check for check in data["kernels"] if check["device"] == "cpu"}
    assert on_cpu["gather"]["status"] == on_cpu["reference"]["status"] == "ok"
    assert all(check["status"] == "ok" or check["why"] for check in data["kernels"])
    assert data["versions"]["torch"] and data["devices"][0]["device"] == "cpu"
    assert all(row["version"] or row["install"] for row in data["optional"])
    assert "Kernels" in cli("doctor").out


def test_doctor_catches_a_kernel_that_gives_wrong_numbers(cli, monkeypatch):
    from dit_attn import kernels

    original = kernels.sparse_attention

    def wrong(q, k, v, layout, **kwargs):
        return original(q, k, v, layout, **kwargs) + 0.01 * (kwargs["backend"] == "gather")

    monkeypatch.setattr(kernels, "sparse_attention", wrong)
    outcome = cli("doctor", "--json")
    assert outcome.code == 1
    statuses = {check["backend"]: check["status"] for check in json.loads(outcome.out)["kernels"]}
    assert statuses["gather"] == "wrong" and statuses["reference"] == "ok"


def test_doctor_reports_a_kernel_that_breaks_and_keeps_to_its_time(monkeypatch):
    from dit_attn import kernels

    def broken(*args, **kwargs):
        raise RuntimeError("no compiler\nmore")

    monkeypatch.setattr(kernels, "sparse_attention", broken)
    checks = doctor.check_kernels()
    assert {check.status for check in checks} == {"unavailable"}
    assert checks[0].why == "RuntimeError: no compiler"
    assert {check.status for check in doctor.check_kernels(budget=-1.0)} == {"skipped"}


def test_demo_makes_files_tables_and_a_picture_of_a_stock_side_and_a_sparse_side(cli, tmp_path):
    outcome = cli("demo", "-o", "out", "--prompts", "1", "--steps", "1", "--sheet", "docs/demo.png")
    assert outcome.code == 0, outcome.err
    data = json.loads((tmp_path / "out/demo.json").read_text())
    assert [item["model"] for item in data["items"]] == list(demo.PROMPTS)
    assert "attention calls" in outcome.out
    for item in data["items"]:
        assert item["prompt"] in outcome.out
        dense, sparse = (json.loads((tmp_path / path).with_suffix(".json").read_text()) for path in item["files"])
        assert dense["summary"] is None and dense["methods"] == []
        assert sparse["summary"]["sparse_calls"] > 0 and sparse["methods"][0]["method"] == "block-sparse"
        assert (dense["prompt"], dense["seed"]) == (sparse["prompt"], sparse["seed"])
        assert dense["sha256"] != sparse["sha256"]
    assert Image.open(tmp_path / "docs/demo.png").size == Image.open(tmp_path / "out/demo.png").size


@pytest.mark.parametrize("prompt", [prompt for prompts in demo.PROMPTS.values() for prompt in prompts])
def test_demo_shows_captions_that_no_model_was_trained_on(prompt):
    assert world.held_out(world.parse(prompt))


def test_demo_reads_the_caption_back_from_the_pixels():
    prompt = demo.PROMPTS["tiny-image"][0]
    drawn = world.render_scenes([world.parse(prompt)], 128)[0].permute(1, 2, 0).numpy()
    right, total = demo._met(prompt, Media((drawn * 255).round().astype("uint8")[None], False))
    assert right == total > 0
    right, total = demo._met(
        "a small red circle at the top on white", Media((drawn * 255).astype("uint8")[None], False)
    )
    assert right < total


def test_a_folder_that_training_wrote_is_called_like_the_embedded_model(tmp_path):
    import shutil

    from dit_attn import models
    from dit_attn.cli import model_source

    copy = tmp_path / "pipeline"
    shutil.copytree(models.available()["tiny-image"].folder, copy)
    assert model_source.describe(str(copy)).defaults == models.call_defaults("tiny-image")
    (copy / "training.json").unlink()
    assert model_source.describe(str(copy)).defaults == {}
