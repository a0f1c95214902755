"""`dit-attn anomaly`: from folders to a data set, and one line for what cannot be used."""

from __future__ import annotations

import json

import pytest

from dit_attn.cli import main


def _train(place, *words):
    folders = {name: place / "data" / name for name in ("normal", "defects", "masks")}
    flags = [str(x) for name, path in folders.items() for x in (f"--{name}", path)]
    model = ["--model", str(place / "model"), "--resolution", "32", "--product", "metal", "--defect", "hole"]
    return main(["anomaly", "train", *model, *flags, "--device", "cpu", *map(str, words)])


def test_from_folders_to_a_data_set(place, capsys):
    out = place / "concept"
    assert _train(place, "--train-steps", 2, "--train-batch", 1, "--output", out) == 0
    assert "metal+hole: 2 shots, ratio 1.00; normal images under the same masks" in capsys.readouterr().out
    words = ["--model", place / "model", "--concept", out / "concept.safetensors", "--normal", place / "data/normal"]
    words += ["--per-defect", 2, "--steps", 2, "--retries", 0, "--controls", 1, "--device", "cpu", "--json"]
    words += ["--format", "mvtec", "--format", "yolo", "--output", place / "pairs"]
    code = main(["anomaly", "generate", *map(str, words)])
    report = json.loads(capsys.readouterr().out)
    told = report["pairs"]["metal+hole"]
    assert told["accepted"] + told["rejected"] == 2 and code == (1 if told["missing"] else 0)
    assert (place / "pairs/mvtec/metal/train/good/000.png").is_file()
    assert (place / "pairs/yolo/data.yaml").is_file()
    page = (place / "pairs/index.html").read_text()
    assert "painted with the normal prompt" in page and "anomaly generate" in page
    assert main(["anomaly", "generate", *map(str, words)]) == 2
    assert "already holds pairs; add --resume" in capsys.readouterr().err
    assert main(["anomaly", "generate", *map(str, words), "--resume"]) == code


@pytest.mark.parametrize(
    ("job", "words", "says"),
    [
        ("trane", (), "Did you mean 'train'"),
        ("train", (), "give either --data DIR"),
        ("train", ("--normal", "data/normal"), "no defect images; give --defects DIR"),
        ("train", ("--normal", "data/normal", "--defects", "data/normal"), "defect images have no mask"),
        ("train", ("--data", "data"), "model"),
        ("train", ("--normal", "data/none"), "there is no such folder"),
        ("generate", (), "no concept; give --concept FILE"),
        ("generate", ("--concept", "data/normal/000.png"), "is damaged|is no concept"),
    ],
)
def test_bad_input_is_one_line(job, words, says, place, capsys, monkeypatch):
    monkeypatch.chdir(place)
    if says == "model":
        assert main(["anomaly", job, "--model", "no-such-model", *words]) == 2
        assert "no-such-model" in capsys.readouterr().err
        return
    assert main(["anomaly", job, "--model", "model", *words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    import re

    assert re.search(says, error), error


def test_a_dry_run_says_what_would_be_learned(place, capsys):
    assert _train(place, "--dry-run", "--output", place / "dry") == 0
    assert "metal+hole: 2 shots, 0 left alone, 3 normal images" in capsys.readouterr().out
    assert not (place / "dry").exists()


def test_the_first_of_several_processes_speaks_and_the_benchmark_takes_one(place, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        assert _train(place, "--dry-run", "--output", place / "dry") == 0
        assert bool(capsys.readouterr().out) == (rank == "0")
        assert main(["anomaly", "benchmark", "--model", str(place / "model")]) == 2
        assert ("anomaly benchmark runs in one process" in capsys.readouterr().err) == (rank == "0")
    assert _train(place, "--train-batch", 3, "--output", place / "dry") == 2
    assert "--train-batch 3 is shared by 2 processes" in capsys.readouterr().err
