"""`dit-attn demo`."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from dit_attn import models
from dit_attn.cli.commands import demo
from dit_attn.cli.jobs import make_jobs
from dit_attn.cli.outputs import Media
from dit_attn.eval.shapes_world import world

ROOT = Path(__file__).resolve().parents[3]


def test_demo_shows_dense_and_methods_that_all_follow_the_prompt(cli, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "LARGE", replace(demo.LARGE, factor=2))  # 4 takes the time of the rest
    outcome = cli("demo", "-o", "out", "--sheet", "docs/demo.png")
    assert outcome.code == 0, outcome.err
    data = json.loads((tmp_path / "out/demo.json").read_text())
    expected = [(item.model, method) for item in demo.SHOWS for method in ("dense", *item.methods)]
    assert [(item["model"], item["method"]) for item in data["items"]] == expected
    for item in data["items"]:
        sidecar = json.loads((tmp_path / item["file"]).with_suffix(".json").read_text())
        assert (sidecar["prompt"], sidecar["seed"]) == (item["prompt"], item["seed"])
        assert item["met"] == item["attributes"] >= 6, item
        if item["method"] == "dense":
            assert item["density"] == 1.0 and sidecar["methods"] == [] and sidecar["summary"] is None
        else:
            assert item["density"] < 0.5 and sidecar["summary"]["sparse_calls"] > 0
            assert item["method"].startswith(sidecar["methods"][0]["method"])
    strip = Image.open(tmp_path / "out/demo.png")
    assert strip.height <= 250
    assert strip.tobytes() == Image.open(tmp_path / "docs/demo.png").tobytes()
    assert outcome.out.splitlines()[-2:] == [data["gained"], data["faster"]]
    dense, window = data["large"]
    assert (dense["method"], window["method"]) == ("dense", "inward-window") and dense["steps"] == window["steps"] == 2
    assert f"{dense['seconds']:.1f} s dense, {window['seconds']:.1f} s in windows" in data["faster"]
    for large in (dense, window):
        assert Image.open(tmp_path / large["file"]).size == (256, 256) and large["met"] >= large["attributes"] - 1
    assert data["gained"].count("(prompt followed)") == len(demo.SHOWS)


@pytest.mark.parametrize("item", demo.SHOWS, ids=lambda item: item.model)
def test_demo_shows_captions_that_no_model_was_trained_on(item):
    assert world.held_out(world.parse(item.prompt))


def test_the_video_that_pages_and_help_show_is_the_one_that_is_verified_here_at_the_default_seed():
    (item,) = (item for item in demo.SHOWS if item.model == "tiny-video")
    (job,) = make_jobs({"prompt": [item.prompt]}, {})
    assert (job.seed, models.info("tiny-video").example) == (item.seed, item.prompt)
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "dit_attn/cli/commands").rglob("*.py")]
    quoted = [text for page in pages for text in re.findall(r'"(a (?:large|small) [^"]+ on \w+)"', page.read_text())]
    videos = [text for text in quoted if "moving" in text or "standing" in text]
    assert len(videos) >= 8 and set(videos) == {item.prompt}


def test_the_last_line_says_what_each_first_method_saved_and_when_it_lost_the_prompt():
    made = [
        demo.Output(item.model, item.prompt, item.seed, method, "", 1.0 if method == "dense" else 0.25, 6, 6)
        for item in demo.SHOWS
        for method in ("dense", *item.methods)
    ]
    first = demo.SHOWS[0].model
    assert demo.gained(made).startswith(
        f"Saved: 75 % of the attention on {first} with rectified-spaattn (prompt followed)"
    )
    made[1] = replace(made[1], met=5)
    assert "rectified-spaattn (prompt not followed, unlike dense)" in demo.gained(made)
    made[0] = replace(made[0], met=5)
    assert "rectified-spaattn (prompt not followed)" in demo.gained(made)


def test_demo_reads_the_caption_back_from_the_pixels():
    prompt = demo.SHOWS[0].prompt
    drawn = world.render_scenes([world.parse(prompt)], 128)[0].permute(1, 2, 0).numpy()
    right, total = demo._met(prompt, Media((drawn * 255).round().astype("uint8")[None], False))
    assert right == total > 0
    right, total = demo._met(
        "a small red circle at the top on white", Media((drawn * 255).astype("uint8")[None], False)
    )
    assert right < total
