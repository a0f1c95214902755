"""A measurement log survives an interruption, refuses another setup, and reports a disk that cannot be written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dit_attn import DitAttnError
from dit_attn.errors import RunStopped
from dit_attn.pipelines.measurement_log import MeasurementLog, shard_log
from dit_attn.pipelines.run import Shard

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


def test_a_value_that_was_edited_is_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    log = MeasurementLog(path, SETUP)
    log.add("all/a", 0.1)
    log.add("all/b", float("nan"))
    log.add("local/a", {"calls": [[1]]})
    path.write_text(path.read_text().replace("0.1", '"x"').replace("[[1]]", "[]"))
    assert list(MeasurementLog(path, SETUP, resume=True).rows) == ["all/b"]


def test_the_last_call_reads_the_logs_of_all_shards(tmp_path: Path) -> None:
    record = tmp_path / "new" / "m.json"
    for number in (1, 2):
        log = shard_log(record, SETUP, True, Shard(number, 2))
        log.add(f"arm|{number}", number)
    assert shard_log(record, SETUP, True, Shard(1, 2)).rows == {"arm|1": 1}
    assert shard_log(record, SETUP, True, None).rows == {"arm|1": 1, "arm|2": 2}
    assert shard_log(record, SETUP, False, None).rows == {}
    with pytest.raises(DitAttnError, match="another model"):
        shard_log(record, {"model": "other"}, True, None)


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


def test_two_processes_do_not_mix_their_measurements(tmp_path: Path) -> None:
    place = tmp_path / "log.jsonl"
    code = (
        "import pathlib, sys; from dit_attn.pipelines.measurement_log import MeasurementLog;"
        f"log = MeasurementLog(pathlib.Path({str(place)!r}), {{'a': 1}}); log.add('one', 1);"
        "print('ready', flush=True); input()"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdin is not None and child.stdout is not None and child.stdout.readline() == "ready\n"
    before = place.read_bytes()
    for resume in (False, True):
        with pytest.raises(DitAttnError, match="another process is measuring"):
            MeasurementLog(place, {"a": 2}, resume)
    assert place.read_bytes() == before
    child.communicate("\n", timeout=60)
    assert MeasurementLog(place, {"a": 1}, resume=True).rows == {"one": 1}


def test_links_are_neither_read_nor_written_through(tmp_path: Path) -> None:
    victim = tmp_path / "victim.jsonl"
    MeasurementLog(victim, {"a": 1}).add("one", 1)
    before, folder = victim.read_bytes(), tmp_path / "out"
    folder.mkdir()
    for name in ("log.jsonl", "log.jsonl.bak", ".partial-log.jsonl"):
        (folder / name).symlink_to(victim)
    with pytest.raises(DitAttnError, match=r"cannot write .*log\.jsonl"):
        MeasurementLog(folder / "log.jsonl", {"a": 1}, resume=True)
    log = MeasurementLog(folder / "log.jsonl", {"a": 1})
    log.add("two", 2)
    assert victim.read_bytes() == before and log.rows == {"two": 2}
    (folder / "log.jsonl").unlink()
    (folder / "log.jsonl").symlink_to(victim)
    with pytest.raises(RunStopped, match="--resume"):
        log.add("three", 3)
    assert victim.read_bytes() == before


def test_lines_at_the_edge_are_measured_again(tmp_path: Path) -> None:
    place = tmp_path / "log.jsonl"
    MeasurementLog(place, {"a": 1}).add("one", 1)
    with place.open("a") as file:
        file.write("[" * 100_000 + "\n" + '{"key": "two", "value": ' + "9" * 5000 + "}\n")
    assert MeasurementLog(place, {"a": 1}, resume=True).rows == {"one": 1}
