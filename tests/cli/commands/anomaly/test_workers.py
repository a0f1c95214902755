"""`anomaly generate` and `anomaly benchmark` on workers: the files and figures of one process."""

from __future__ import annotations

import json
import shutil

import pytest

from dit_attn.cli import main


@pytest.fixture(scope="module")
def concept(place):
    folders = {name: place / "data" / name for name in ("normal", "defects", "masks")}
    words = ["--model", place / "model", "--resolution", 32, "--product", "metal", "--defect", "hole"]
    words += [x for name, path in folders.items() for x in (f"--{name}", path)]
    words += ["--train-steps", 2, "--train-batch", 1, "--device", "cpu", "--output", place / "learned"]
    assert main(["anomaly", "train", *map(str, words)]) == 0
    return place / "learned" / "concept.safetensors"


def made(folder):
    """The images and tables of a run; the page and the summaries hold the command."""
    kept = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "index.html"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in kept}


def test_workers_make_the_files_of_one_process_and_go_on_with_them(place, concept, tmp_path, capsys, engine):
    words = ["--model", place / "model", "--concept", concept, "--normal", place / "data/normal", "--per-defect", 5]
    words += ["--steps", 2, "--retries", 1, "--batch", 2, "--controls", 2, "--device", "cpu", "--json"]

    def generate(folder, *more):
        code = main(["anomaly", "generate", *map(str, [*words, "--output", folder, *more])])
        return code, capsys.readouterr()

    alone, workers = tmp_path / "alone", tmp_path / "workers"
    code, said = generate(alone)
    assert generate(workers, *engine)[0] == code and json.loads(said.out)["pairs"]["metal+hole"]["wanted"] == 5
    assert made(workers) == made(alone) and len(made(alone)) > 10
    rows = (workers / "manifest.jsonl").read_text().splitlines(keepends=True)
    (workers / "manifest.jsonl").write_text("".join(rows[:2]))
    shutil.rmtree(workers / "mvtec")
    assert generate(workers, "--resume")[0] == code and made(workers) == made(alone)  # another engine goes on


def test_workers_measure_what_one_process_does(place, tmp_path, engine):
    words = ["--model", place / "model", "--resolution", 32, "--device", "cpu", "--k", 1, "--pairs", 2, "--quick"]
    words += ["--segmenter-steps", 2, "--segmenter-width", 4, "--segmenter-size", 32, "--product", "metal"]
    words += ["--defect", "hole", "--arms", "crop-paste", "generated", "--train-steps", 2, "--train-batch", 1]
    words += ["--steps", 2, "--retries", 0, "--seeds", 2]
    rows = []
    for name, more in (("alone", ()), ("workers", engine)):
        assert main(["anomaly", "benchmark", *map(str, [*words, "--output", tmp_path / name, *more])]) == 0
        found = json.loads((tmp_path / name / "results.json").read_text())["measurements"]
        assert all(row.pop("seconds") and row["pairs"].pop("concept_seconds", 1.0) is not None for row in found)
        rows.append(found)
    assert rows[0] == rows[1] and len(rows[0]) == 6
