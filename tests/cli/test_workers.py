"""Several processes of one command share its items, or are refused in one line."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import pytest

from dit_attn.cli import main
from dit_attn.cli.workers import process_rank
from dit_attn.errors import DitAttnError
from dit_attn.pipelines.worker_share import WorkerShare

WORDS = ("--model", "tiny-image", "--height", "32", "--width", "32", "--steps", "1")
PROMPTS = ("a large red circle at the left on white", "a large blue square at the right on white", "a cat")


def test_shares_are_disjoint_and_complete():
    parts = [WorkerShare(rank, 3).part(range(7)) for rank in range(3)]
    assert parts == [[0, 3, 6], [1, 4], [2, 5]] and WorkerShare().part("ab") == ["a", "b"]


@pytest.mark.parametrize(("rank", "size"), [("x", "2"), ("2", "2"), ("-1", "2"), ("0", "many")])
def test_an_environment_that_makes_no_sense_is_refused(monkeypatch, rank, size):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", size)
    with pytest.raises(DitAttnError, match=f"RANK='{rank}' and WORLD_SIZE='{size}'"):
        process_rank()


@pytest.mark.parametrize("command", ["compare", "eval", "inspect", "calibrate", "train", "demo", "bench"])
def test_commands_that_do_not_share_are_refused_once(monkeypatch, capsys, tmp_path, command):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    given = {"eval": ["."], "train": ["tiny-image"], "demo": [], "bench": ["kernels"]}.get(command, [*WORDS[:2]])
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        assert main([command, *given]) == 2
        err = capsys.readouterr().err
        assert (f"dit-attn {command} runs in one process, and 2 were started" in err) == (rank == "0"), err
    assert not list(tmp_path.iterdir())


def test_jobs_of_shared_commands_that_run_alone_are_refused_once(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        assert main(["finetune", "merge"]) == 2
        assert ("finetune merge runs in one process, and 2 were" in capsys.readouterr().err) == (rank == "0")


def test_generate_shares_the_items_and_writes_one_report(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    prompts = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    words = ["generate", *WORDS, *prompts, "--output", str(tmp_path), "--method", "block-sparse:density=0.5"]
    several = [
        subprocess.Popen(
            [sys.executable, "-m", "dit_attn", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank), "CUDA_VISIBLE_DEVICES": ""},
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [one.communicate(timeout=600) for one in several]
    assert [one.returncode for one in several] == [0, 0], said
    assert [[f"[{i}/3]" in out for i in (1, 2, 3)] for out, _ in said] == [[True, False, True], [False, True, False]]
    names = sorted(path.name for path in tmp_path.iterdir())
    assert len(names) == 2 * len(PROMPTS) + 2 and {"run.json", "sheet.png"} < set(names)
    report = json.loads((tmp_path / "run.json").read_text())
    assert report["done"] == 3 and [item["prompt"] for item in report["items"]] == list(PROMPTS)
    assert "contact sheet" in said[0][0] and "contact sheet" not in said[1][0]
