"""`dit-attn explain`."""

from __future__ import annotations

import functools
import json

import pytest


def test_explain_needs_no_weights_and_agrees_with_the_loaded_pipeline(cli, folder_model, tmp_path):
    import dit_attn
    from dit_attn import models

    data = json.loads(cli("explain", "--model", "tiny-video", "--method", "block-sparse", "--json").out)
    call = models.call_defaults("tiny-video")
    size = {key: call[key] for key in ("height", "width", "num_frames")}
    steps = call["num_inference_steps"]
    expected = dit_attn.explain(models.load("tiny-video"), "block-sparse", **size, num_inference_steps=steps).to_dict()
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


def test_without_a_network_a_public_model_is_explained_by_its_built_in_shape(cli):
    outcome = cli("explain", "--model", "Wan-AI/Wan2.1-T2V-14B-Diffusers", "--method", "rectified-spaattn")
    assert outcome.code == 0, outcome.err
    assert "offline: built-in shape of Wan 2.1 14B" in outcome.out
    assert "wan2.1-14b for rectified-spaattn (from the paper)" in outcome.out
    assert "75,600 = 21 x 45 x 80" in outcome.out


@pytest.mark.parametrize(
    ("model", "title", "tokens"),
    [
        ("krea/Krea-2-Turbo", "Krea 2", "4,096 = 1 x 64 x 64"),
        ("MiniMaxAI/MiniMax-H3", "MiniMax-H3", "37,296 = 37 x 24 x 42"),
        ("nvidia/Cosmos3-Nano", "Cosmos 3 Nano", "44,160 = 48 x 23 x 40"),
    ],
)
def test_built_in_shapes_are_used_at_the_size_of_their_pipelines(cli, model, title, tokens):
    outcome = cli("explain", "--model", model, "--method", "block-sparse")
    assert outcome.code == 0, outcome.err
    assert f"offline: built-in shape of {title}" in outcome.out and tokens in outcome.out


def test_steps_are_those_of_the_run(cli):
    method = ("--method", "block-sparse:density=0.25,dense_steps=2")
    words = ("explain", "--model", "tiny-image", "--height", "512", "--width", "512", *method)
    assert "2 of 20 steps: dense by setting" in cli(*words).out
    assert "2 of 4 steps: dense by setting" in cli(*words, "--steps", "4").out
    cli(*words, "--steps", "0").refused("--steps must be at least 1")


def test_every_built_in_shape_is_a_known_architecture_that_can_be_explained():
    from dit_attn.cli.built_in_shape import SHAPES, built_in_shape
    from dit_attn.models.architectures import ARCHITECTURES

    assert [shape.config for shape in SHAPES] == [row.name for row in ARCHITECTURES]
    assert built_in_shape("black-forest-labs/FLUX.1-dev") is built_in_shape("Black-Forest-Labs/flux.1-dev")
    assert built_in_shape("someone/FLUX.1-dev") is None
