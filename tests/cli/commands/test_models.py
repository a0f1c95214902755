"""`dit-attn models`."""

from __future__ import annotations

import json


def test_models_lists_what_can_be_used_and_says_that_weights_have_terms(cli):
    from dit_attn import models, supported

    outcome = cli("models")
    assert outcome.code == 0
    for name in (*models.available(), *supported()):
        assert name in outcome.out
    assert "licences" in outcome.out
    assert outcome.out.count("rectified-spaattn") == 1  # what holds for all families is said once
    lines = {line.split()[0]: line for line in outcome.out.splitlines() if line.strip()}
    for name in models.available():
        assert " % of " in lines[name] or "not recorded" in lines[name]
    data = json.loads(cli("models", "--json").out)
    assert {entry["name"] for entry in data["embedded"]} == set(models.available())
    assert data["families"] == supported()


def test_every_example_of_models_can_be_generated(cli):
    for entry in json.loads(cli("models", "--json").out)["embedded"]:
        outcome = cli("generate", "--model", entry["name"], "--prompt", entry["example"], "--dry-run")
        assert outcome.code == 0


def test_a_folder_that_training_wrote_is_called_like_the_embedded_model(tmp_path):
    import shutil

    from dit_attn import models
    from dit_attn.cli import model_source

    copy = tmp_path / "pipeline"
    shutil.copytree(models.available()["tiny-image"].folder, copy)
    assert model_source.describe(str(copy)).defaults == models.call_defaults("tiny-image")
    (copy / "training.json").unlink()
    assert model_source.describe(str(copy)).defaults == {}
