"""`dit-attn explain`."""

from __future__ import annotations

import functools
import json


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
