"""`dit-attn demo`."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from dit_attn.cli.commands import demo
from dit_attn.cli.outputs import Media
from dit_attn.eval.shapes_world import world


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
