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


def test_an_estimate_comes_before_weights_and_knows_times_of_earlier_runs(place, capsys):
    words = ("--train-steps", 4, "--train-batch", 2, "--output", place / "timed")
    assert _train(place, *words, "--estimate") == 0
    told = capsys.readouterr().out
    assert "peak         about" in told and "unknown: this machine has not been timed" in told
    assert not (place / "timed").exists()
    assert _train(place, *words) == 0
    capsys.readouterr()
    assert _train(place, *words, "--estimate", "--json") == 0
    assert json.loads(capsys.readouterr().out)["seconds"] > 0


def test_flux_is_estimated_without_a_network_and_without_data(capsys):
    words = ["--model", "black-forest-labs/FLUX.1-dev", "--dtype", "bf16", "--device", "cpu", "--json", "--estimate"]
    assert main(["anomaly", "train", *words, "--train-batch", "1", "--gradient-checkpointing"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["about"] == "offline: built-in shape of FLUX.1"
    assert 22 < found["transformer"] / 2**30 < 23 and found["checkpointed"] < 0.15 * found["activations"]
    assert 24 < found["peak"] / 2**30 < 40
    assert main(["anomaly", "train", "--model", "Qwen/Qwen-Image", "--estimate"]) == 2
    assert "Shapes that are built in: FLUX.1, PixArt-Sigma" in capsys.readouterr().err


def test_a_run_on_a_terminal_begins_with_its_estimate_and_does_without_one_that_fails(capsys, monkeypatch):
    from dit_attn.cli.commands.anomaly import estimate

    options = {"model": "tiny-inspect", "device": "cpu"}
    monkeypatch.setattr(estimate, "on_terminal", lambda: True)
    estimate.before(options, lambda shape: f"{shape.about}, {shape.text_tokens} tokens")
    assert "PixArtSigmaPipeline, 16 tokens" in capsys.readouterr().err
    estimate.before(options, lambda shape: 1 / 0)
    assert "Error" not in capsys.readouterr().err
