"""`dit-attn anomaly benchmark`: a record, a page and words, and one line for what cannot be used."""

from __future__ import annotations

import json
import re

import pytest

from dit_attn.cli import main

TINY = ["--k", 1, "--pairs", 2, "--segmenter-steps", 2, "--segmenter-width", 4, "--segmenter-size", 32]


def _benchmark(place, *words):
    flags = ["--model", place / "model", "--resolution", 32, "--device", "cpu", *words]
    return main(["anomaly", "benchmark", *map(str, flags)])


def test_a_run_ends_in_a_record_and_a_page_and_takes_more_seeds_later(place, capsys):
    words = [*TINY, "--quick", "--product", "metal", "--defect", "hole", "--arms", "crop-paste", "generated"]
    words += ["--train-steps", 2, "--train-batch", 1, "--steps", 2, "--retries", 0, "--output", place / "out"]
    assert _benchmark(place, *words, "--seeds", 1) == 0
    out = capsys.readouterr().out
    assert "none" in out and "crop-paste" in out and "written to" in out
    first = json.loads((place / "out/results.json").read_text())
    assert [row["arm"] for row in first["measurements"]] == ["none", "crop-paste", "generated"]
    assert set(first["measurements"][0]["scores"]) == {"pixel_ap", "pro", "pixel_auroc", "image_auroc"}
    assert set(first["measurements"][0]["traces"]) == {"untouched", "decoded", "painted"}
    page = (place / "out/index.html").read_text()
    assert "Control: traces of the model" in page and "anomaly benchmark" in page
    assert _benchmark(place, *words, "--seeds", 1) == 2
    assert "already holds a benchmark; add --resume" in capsys.readouterr().err
    assert _benchmark(place, *words, "--seeds", 2, "--resume", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    both = json.loads((place / "out/results.json").read_text())["measurements"]
    assert both[:3] == first["measurements"] and len(both) == 6
    assert {row["arm"] for row in said["table"]} == {"none", "crop-paste", "generated"}


def test_given_images_are_split_and_a_dry_run_says_how(place, capsys):
    folders = {name: place / "data" / name for name in ("normal", "defects", "masks")}
    given = [x for name, path in folders.items() for x in (f"--{name}", path)]
    words = ["--product", "metal", "--defect", "hole", "--k", 1, 5, "--arms", "none", "perlin", "--dry-run"]
    assert _benchmark(place, *given, *words, "--output", place / "dry") == 0
    out = capsys.readouterr().out
    assert "metal+hole, given images: 1 shots, 2 normal images; test: 1 with the defect, 1 without" in out
    assert "k 5 is left out, there are 1 shots" in out and "arms: none, perlin" in out
    assert not (place / "dry").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--arms", "perlin", "cutpast"), "Did you mean 'cutpaste'"),
        (("--segmenter-size", 60), "no multiple of 8"),
        (("--count", 5), "--count is not for `anomaly benchmark`"),
        (("--product", "nutt"), "Did you mean 'nut'"),
        (("--defects", "data/defects"), "give --normal DIR too"),
        (("--normal", "data/normal"), "no defect images"),
        (("--k", 0), "k"),
        (("--seeds", 0), "seeds"),
    ],
)
def test_bad_input_is_one_line(words, says, place, capsys, monkeypatch):
    monkeypatch.chdir(place)
    assert _benchmark(place, *words) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.search(says, error), error
