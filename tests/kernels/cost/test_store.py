"""The file of measured tables: per machine, shared by processes, ignored with one line where it cannot be used."""

from __future__ import annotations

import json
import multiprocessing
import os
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dit_attn.errors import DitAttnError
from dit_attn.kernels.cost import Cost, CostTable, Machine
from dit_attn.kernels.cost.store import FORMAT, VARIABLE, costs_path, save_table, saved_table

HERE = Machine("cpu", "a processor, 2 cores", 2, "2.13.0", 1)
TABLE = CostTable(HERE, (Cost(64, "float32", 4096, 0.25, 0.5, "gather"),))


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "new" / "costs.json"
    monkeypatch.setenv(VARIABLE, str(path))
    return path


def test_the_file_is_in_the_users_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert costs_path() == tmp_path / "dit_attn" / "costs.json"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert costs_path() == tmp_path / ".cache" / "dit_attn" / "costs.json"
    monkeypatch.setenv(VARIABLE, "~/mine.json")
    assert costs_path() == tmp_path / "mine.json"


def test_a_table_is_found_again_on_its_machine_alone(file: Path) -> None:
    assert saved_table(HERE) == (None, "run dit-attn bench kernels --save to measure it")
    assert save_table(TABLE) == file and saved_table(HERE) == (TABLE, "")
    others = (
        replace(HERE, threads=1), replace(HERE, torch="2.14"), replace(HERE, kernels=2),
        replace(HERE, compiled=True), replace(HERE, hardware="x"),
    )  # fmt: skip
    for other in others:
        found, why = saved_table(other)
        assert found is None and "other threads or versions" in why


def test_a_new_table_replaces_that_of_its_machine_and_no_other(file: Path) -> None:
    other = replace(TABLE, machine=replace(HERE, threads=1))
    save_table(other)
    save_table(TABLE)
    save_table(replace(TABLE, costs=()))
    assert saved_table(HERE)[0] == replace(TABLE, costs=()) and saved_table(other.machine)[0] == other
    assert len(json.loads(file.read_text())["tables"]) == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{not json", "is not used (Expecting property name"),
        ("[]", "it holds no cost tables"),
        (json.dumps({"format": FORMAT + 1, "tables": []}), f"its format is {FORMAT + 1}, this version reads {FORMAT}"),
        (json.dumps({"format": FORMAT, "tables": [{"machine": 3}]}), "not as dit-attn writes it"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_a_file_that_cannot_be_used_is_ignored_with_one_line_once(file: Path, text: str, words: str) -> None:
    file.parent.mkdir()
    file.write_text(text)
    with pytest.warns(UserWarning) as caught:
        found, why = saved_table(HERE)
    assert found is None and words in why and "dit-attn bench kernels --save" in why
    assert [str(each.message).count("\n") for each in caught] == [0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert saved_table(HERE) == (None, why)
    save_table(TABLE)  # measuring again repairs it
    assert saved_table(HERE)[0] == TABLE


def save_ten(first: int) -> None:
    for i in range(10):
        save_table(replace(TABLE, machine=replace(HERE, threads=first + i)))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked, which saves their imports")
def test_two_processes_lose_no_table(file: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=save_ten, args=(first,)) for first in (100, 200)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert len(json.loads(file.read_text())["tables"]) == 20
    assert [path.name for path in file.parent.iterdir()] == ["costs.json"]


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "file" / "costs.json"))
    with pytest.raises(DitAttnError, match=rf"cannot save the costs to .*; set {VARIABLE} to a file"):
        save_table(TABLE)
    assert saved_table(HERE)[0] is None
