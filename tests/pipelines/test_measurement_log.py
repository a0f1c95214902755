"""A measurement log survives an interruption, refuses another setup, and reports a disk that cannot be written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dit_attn import DitAttnError
from dit_attn.errors import RunStopped
from dit_attn.pipelines.measurement_log import MeasurementLog

SETUP = {"model": "m", "densities": (0.5, 0.25)}


def test_a_log_returns_what_was_added(tmp_path: Path) -> None:
    path, added = tmp_path / "m.jsonl", []
    log = MeasurementLog(path, SETUP, on_result=added.append)
    log.add("all/a", 0.1)
    log.add("local/a", {"error2": [[0.1]]})
    assert added == ["all/a", "local/a"]
    again = MeasurementLog(path, SETUP, resume=True)
    assert again.rows == log.rows
    again.add("all/b", 0.2)
    assert set(MeasurementLog(path, SETUP, resume=True).rows) == {"all/a", "local/a", "all/b"}


def test_a_line_that_was_cut_off_is_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    log = MeasurementLog(path, SETUP)
    log.add("all/a", 0.1)
    log.add("all/b", 0.2)
    path.write_text(path.read_text()[:-7])
    again = MeasurementLog(path, SETUP, resume=True)
    assert again.rows == {"all/a": 0.1}
    again.add("all/b", 0.2)
    assert MeasurementLog(path, SETUP, resume=True).rows == log.rows
    path.write_text(json.dumps({"setup": {}})[:5])  # not even the set-up was written
    assert MeasurementLog(path, SETUP, resume=True).rows == {}


def test_a_log_of_another_setup_is_refused_and_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    MeasurementLog(path, SETUP).add("all/a", 0.1)
    before = path.read_text()
    with pytest.raises(DitAttnError, match="another model, method, prompts or settings"):
        MeasurementLog(path, {**SETUP, "model": "other"}, resume=True)
    assert path.read_text() == before


def test_starting_anew_renames_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    MeasurementLog(path, SETUP).add("all/a", 0.1)
    before = path.read_text()
    assert MeasurementLog(path, {"model": "other"}).rows == {}
    assert (tmp_path / "m.jsonl.bak").read_text() == before and {p.name for p in tmp_path.iterdir()} == {
        "m.jsonl",
        "m.jsonl.bak",
    }


def test_a_disk_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    with pytest.raises(DitAttnError, match="choose another --output"):
        MeasurementLog(tmp_path / "nowhere" / "m.jsonl", SETUP)
    log = MeasurementLog(tmp_path / "m.jsonl", SETUP)
    (tmp_path / "m.jsonl").unlink()
    (tmp_path / "m.jsonl").mkdir()
    with pytest.raises(RunStopped, match="--resume"):
        log.add("all/a", 0.1)
    assert "all/a" not in log.rows


def test_lines_that_are_no_measurements_are_left_out(tmp_path: Path) -> None:
    place = tmp_path / "store.jsonl"
    MeasurementLog(place, {"a": 1}).add("one", [1.0, 2.0, 1])
    with place.open("a") as file:
        file.write('{"key": "two"}\n{"key": [1], "value": 3}\n[]\n{"half')
    assert MeasurementLog(place, {"a": 1}, resume=True).rows == {"one": [1.0, 2.0, 1]}
