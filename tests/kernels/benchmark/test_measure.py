"""The measuring harness: what it reports follows from what it ran, and mistakes cost one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dit_attn.cli import main
from dit_attn.errors import DitAttnError
from dit_attn.kernels import BlockLayout
from dit_attn.kernels.benchmark import measure, third_party

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
    monkeypatch.setitem(measure.SHAPES, "flux-2048", (256, 2, 16))
    file = tmp_path / "plots" / "speed.svg"
    flags = ["--shape", "flux-2048", "--block", "32", "--repeats", "1", "--against", "reference"]
    flags += ["--inputs", "structured"]
    assert main(["bench", "kernels", *flags, "--dtype", "float32", "--plot", str(file), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["shape"]["seq"] == 256 and record["inputs"] == "structured"
    row = record["rows"]["float32"][0]
    assert set(row["others"]) == {"reference"} and row["dense_backend"] == "sdpa" and row["tflops"] > 0
    assert row["other_errors"]["reference"] < 1e-5 and row["counts"]["max"] > row["counts"]["mean"]
    assert "<svg" in file.read_text()


def test_what_cannot_be_measured_or_drawn_is_said_before_anything_is_timed(monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(measure, "interleaved", lambda *args: pytest.fail("timed"))
    for flags in (["--plot", "speed.pdf"], ["--backend", "triton-tma"], ["--against", "nobody"]):
        assert main([*SMALL, *flags]) == 2
        assert "\n" not in capsys.readouterr().err.strip()


def test_a_competitor_that_cannot_run_costs_its_own_figures_only(capsys: Any) -> None:
    flags = ["--dtype", "float32", "--density", "0.5", "--against", "spargeattn", "triton-tma", "reference", "--json"]
    assert main([*SMALL, *flags]) == 0
    record = json.loads(capsys.readouterr().out)
    failed = record["failed"]["float32"]
    assert set(failed) == {"spargeattn", "triton-tma"} and "not installed" in failed["spargeattn"]
    assert set(record["rows"]["float32"][0]["others"]) == {"reference"} and record["notes"] == {}


def test_a_recorded_call_is_measured_as_it_is(tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "call.safetensors"
    save_file({name: torch.randn(1, 300, 2, 16) for name in "qkv"}, file)
    flags = ["--inputs", str(file), "--block", "32", "--dtype", "float32", "--density", "0.5", "--repeats", "1"]
    assert main(["bench", "kernels", *flags, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["inputs"] == "captured" and record["shape"]["seq"] == 300
    assert str(tmp_path) not in record["command"] and record["rows"]["float32"][0]["error"] < 1e-5
    save_file({"q": torch.randn(1, 300, 2, 16)}, file)
    assert main(["bench", "kernels", *flags]) == 2
    assert "has no (B, S, H, D) tensor 'k'" in capsys.readouterr().err


def test_blocks_of_rivals_are_those_of_the_layout() -> None:
    layout = BlockLayout.from_mask(torch.rand(1, 2, 2, 3) < 0.5, 250, 300, 128, 128)
    mask = third_party.expanded(layout, 2, 2, 64, 32)
    assert mask.shape == (2, 2, 4, 10) and mask.is_contiguous()
    tokens = mask.repeat_interleave(64, 2).repeat_interleave(32, 3)[0, :, :250, :300]
    assert torch.equal(tokens, layout.materialize()[0])
    assert third_party.block_sizes(300, 128, 2, torch.device("cpu")).tolist() == [[128, 128, 44]] * 2
    with pytest.raises(DitAttnError, match="do not divide"):
        third_party.expanded(layout, 1, 2, 96, 64)


def test_an_attention_call_of_a_trained_model_is_kept(tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "kept.safetensors"
    flags = ["--source", "tiny-image", "--steps", "1", "--height", "128", "--width", "128", "--device", "cpu"]
    assert main(["bench", "capture", *flags, "--output", str(file)]) == 0
    held = load_file(file)
    assert set(held) == {"q", "k", "v"} and held["q"].ndim == 4 and held["q"].isfinite().all()
    assert "layer 3 of 6, step 0 of 1" in capsys.readouterr().out
    assert main(["bench", "capture", "--output", str(tmp_path / "x.json")]) == 2
    assert "needs --output FILE.safetensors" in capsys.readouterr().err


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
        (["--against", "flash"], "unknown --against 'flash'"),
        (["--inputs", "noise"], "--inputs is random, structured or a .safetensors file"),
        (["--inputs", "gone.safetensors"], "--seq is not for recorded --inputs"),
        (["--sharpness", "0"], "--sharpness must be above 0"),
        (["--backend", "gathr"], "unknown attention backend 'gathr'"),
        (["--device", "cuda:99"], "cuda"),
        (["--steps", "3"], "--steps is not for bench kernels"),
        (["--random-weights"], "--random-weights is not for bench kernels"),
        (["--plot", "speed.xyz"], "--plot draws .png or .svg files, got 'speed.xyz'"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(flags: list[str], words: str, capsys: Any) -> None:
    assert main([*SMALL, *flags]) == 2
    error = capsys.readouterr().err.strip()
    assert words in error and "\n" not in error


def test_recorded_inputs_that_are_gone_are_named(capsys: Any) -> None:
    assert main(["bench", "kernels", "--inputs", "gone.safetensors"]) == 2
    error = capsys.readouterr().err.strip()
    assert "cannot read gone.safetensors" in error and "\n" not in error


def test_densities_that_come_to_the_same_blocks_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--seq", "256", "--heads", "1", "--dim", "16", "--block", "32", "--repeats", "1", "--dtype", "float32"]
    assert main(["bench", "kernels", *flags, "--density", "0.5", "0.125", "0.0625"]) == 0
    out = capsys.readouterr().out
    assert "densities 0.125 and 0.0625 come to the same blocks (12.5 % of 8 a row)" in out
    assert out.count("come to the same") == 1
