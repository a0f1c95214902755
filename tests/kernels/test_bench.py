"""The measuring harness: what it reports follows from what it ran, and mistakes cost one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dit_attn.cli import main
from dit_attn.kernels import bench

SMALL = ["bench", "kernels", "--seq", "300", "--heads", "2", "--dim", "16", "--block", "32", "--repeats", "2"]


def test_a_measurement_is_written_with_everything_needed_to_repeat_it(tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "new" / "cpu.json"
    assert main([*SMALL, "--dtype", "float32", "--density", "0.5", "0.2", "--output", str(file)]) == 0
    record = json.loads(file.read_text())
    assert record["command"].startswith("dit-attn bench kernels --seq 300") and str(tmp_path) not in file.read_text()
    assert {"hardware", "threads", "torch"} <= set(record["environment"])
    half, fifth = record["rows"]["float32"]
    assert half["density"] == 0.5 and fifth["density"] == 0.2  # ceil(0.2 * 10 blocks)
    for row in (half, fifth):
        assert row["speedup"] == pytest.approx(row["dense_ms"] / row["sparse_ms"], rel=2e-3)
        assert row["error"] < 1e-5 and row["backend"] == "gather"
    assert "speed-up" in capsys.readouterr().out


def test_a_known_models_layer_is_named_and_drawn(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setitem(bench.SHAPES, "flux-2048", (256, 2, 16))
    file = tmp_path / "plots" / "speed.svg"
    flags = ["--shape", "flux-2048", "--block", "32", "--repeats", "1", "--against", "reference", "--structured"]
    assert main(["bench", "kernels", *flags, "--dtype", "float32", "--plot", str(file), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["shape"]["seq"] == 256 and record["layout"] == "structured"
    row = record["rows"]["float32"][0]
    assert set(row["others"]) == {"reference"} and row["dense_backend"] == "sdpa" and row["tflops"] > 0
    assert "<svg" in file.read_text()


def test_a_named_backend_and_the_spread_of_the_logits_are_used_and_told(capsys: Any) -> None:
    flags = ["--dtype", "float32", "--density", "0.5", "--backend", "reference", "--sharpness", "4", "--json"]
    assert main([*SMALL, *flags]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["rows"]["float32"][0]["backend"] == "reference" and record["sharpness"] == 4.0
    assert "--backend reference --sharpness 4.0" in record["command"]


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--seq", "0"], "--seq must be at least 1"),
        (["--density", "1.5"], "--density must be above 0"),
        (["--dtype", "float8"], "unknown --dtype"),
        (["--shape", "wan"], "unknown --shape 'wan'"),
        (["--sharpness", "0"], "--sharpness must be above 0"),
        (["--backend", "gathr"], "unknown attention backend 'gathr'"),
        (["--device", "cuda:99"], "cuda"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(flags: list[str], words: str, capsys: Any) -> None:
    assert main([*SMALL, *flags]) == 2
    error = capsys.readouterr().err.strip()
    assert words in error and "\n" not in error
