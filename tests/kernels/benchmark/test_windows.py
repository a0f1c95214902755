"""``bench windows``: three kinds of windows, each in turn with a dense call, and a record of where it was measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dit_attn.__main__ import main
from dit_attn.kernels.benchmark import windows


def test_windows_are_measured_next_to_dense_calls() -> None:
    rows = windows.measure_windows(16, 8, 2, 16, 1, 3)
    assert [row.kind for row in rows] == ["snapped", "exact", "row-major"]
    for row in rows:
        assert len(row.ratios) == 3 and min(row.ratios) <= row.ratio <= max(row.ratios) and 0 < row.density <= 1


def test_snapped_and_exact_windows_are_those_of_the_layouts() -> None:
    layouts = windows.window_layouts(32, 16)
    assert layouts["snapped"].elements is None and layouts["exact"].elements is not None
    assert layouts["exact"].token_density == layouts["row-major"].token_density == 0.25


def test_the_command_writes_a_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(windows, "SIDES", (16,))
    monkeypatch.setattr(windows, "WINDOW", 8)
    file, threads = tmp_path / "windows.json", torch.get_num_threads()
    flags = ["bench", "windows", "--repeats", "1", "--heads", "1", "--dim", "16", "--threads", str(threads)]
    assert main([*flags, "--output", str(file)]) == 0
    record = json.loads(file.read_text())
    assert len(record["rows"]) == 3 and record["commit"] and record["load_average"]["cores"]
    assert record["command"] == f"dit-attn bench windows --batch 1 --heads 1 --dim 16 --repeats 1 --threads {threads}"
    assert "snapped" in capsys.readouterr().out
    assert main([*flags, "--device", "cuda"]) == 2 and main([*flags, "--seq", "64"]) == 2
