"""`eval --export vbench`: every video under VBench's name, its prompt in a file, and nothing foreign touched."""

from __future__ import annotations

import json

import imageio
import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def videos(tmp_path):
    """A folder as ``generate`` leaves it: two videos with sidecars."""
    folder = tmp_path / "made"
    folder.mkdir()
    for seed, prompt in enumerate(("a red circle", "a blue square")):
        frames = [np.full((32, 32, 3), 20 * t + seed, dtype=np.uint8) for t in range(4)]
        imageio.mimwrite(folder / f"{seed}.mp4", frames, fps=8, macro_block_size=1)
        (folder / f"{seed}.json").write_text(json.dumps({"prompt": prompt, "seed": seed}))
    return folder


@pytest.fixture
def export(cli):
    return lambda folder, *words: cli("eval", folder, "--export", "vbench", *words)


def test_every_video_gets_its_name_and_the_command_is_printed(export, videos, tmp_path):
    outcome = export("made", "-o", "out")
    assert outcome.code == 0, outcome.err
    assert "2 videos of made in" in outcome.out and "vbench evaluate" in outcome.out
    prompts = json.loads((tmp_path / "out/prompts.json").read_text())
    assert sorted(prompts.values()) == ["a blue square", "a red circle"]
    assert {path.name for path in (tmp_path / "out/videos").iterdir()} == set(prompts)
    again = json.loads(export("made", "-o", "out", "--json").out)
    assert again["sets"][0]["kept"] == 2 and again["skipped"] == []


def test_what_vbench_cannot_use_is_named_and_makes_the_exit_code_1(export, videos):
    Image.new("RGB", (8, 8)).save(videos / "still.png")
    outcome = export("made", "-o", "out")
    assert outcome.code == 1 and "left out made/still.png: an image; VBench measures videos" in outcome.err


def test_folders_of_a_comparison_become_one_set_each(export, videos, tmp_path):
    (tmp_path / "compared").mkdir()
    videos.rename(tmp_path / "compared" / "dense")
    outcome = export("compared", "-o", "out", "--json")
    assert outcome.code == 0, outcome.err
    assert [one["label"] for one in json.loads(outcome.out)["sets"]] == ["dense"]


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ((), ("--export needs --output FOLDER",)),
        (("-o", "out", "--reference", "made"), ("--reference measures, --export does not",)),
        (("-o", "out", "--metric", "psnr"), ("--metric measures, --export does not",)),
        (("-o", "made/0.mp4"), ("is a file; give a folder",)),
    ],
)
def test_bad_input_is_one_line(export, videos, words, parts):
    export("made", *words).refused(*parts)


def test_files_that_no_export_wrote_are_not_touched(export, videos, tmp_path):
    (tmp_path / "out/videos").mkdir(parents=True)
    (tmp_path / "out/videos/mine.mp4").write_bytes(b"precious")
    export("made", "-o", "out").refused("mine.mp4 was not written by --export")
    assert (tmp_path / "out/videos/mine.mp4").read_bytes() == b"precious"


def test_a_video_without_prompt_is_refused(export, videos):
    (videos / "0.json").unlink()
    export("made", "-o", "out").refused("VBench's names are prompts", "give --captions FILE")


def test_prompts_of_vbench_belong_to_its_export(cli, videos, tmp_path):
    (tmp_path / "info.json").write_text("[]")
    cli("eval", "made", "--vbench-info", "info.json").refused("--vbench-info belongs to --export vbench")
