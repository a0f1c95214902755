"""``--workers``, ``--engine`` and ``--shard``: the same bytes as one process, and bad input in one line."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from dit_attn.cli import engines, item_worker, main
from dit_attn.cli.options import Options
from dit_attn.cli.worker_setup import check_same_setup
from dit_attn.errors import DitAttnError
from dit_attn.pipelines.run import Recipe

WORDS = ["generate", "--model", "tiny-image", "--height", "32", "--width", "32", "--steps", "1"]
PROMPTS = [
    {"prompt": "a large red circle at the left on white"},
    {"prompt": "a cat", "pipeline_kwargs": {"sigmas": ["none"]}},  # every worker fails it
    {"prompt": "a large blue square at the right on white"},
]


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    file = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    file.write_text("\n".join(map(json.dumps, PROMPTS)))
    return [*WORDS, "--prompts", str(file), "--method", "block-sparse:density=0.5"]


@pytest.fixture(scope="module")
def alone(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files that one process makes."""
    folder = tmp_path_factory.mktemp("alone")
    assert main([*words, "--output", str(folder)]) == 1
    return images(folder)


def images(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("0*.png")}


def test_two_processes_make_the_bytes_of_one_and_park_what_fails(words, alone, tmp_path, capsys):
    assert main([*words, "--output", str(tmp_path), "--workers", "2"]) == 1
    said = capsys.readouterr()
    assert "1 of 3 items failed" in said.err and said.err.count("(tried 3 times)") == 1
    assert images(tmp_path) == alone and len(alone) == 2
    report = json.loads((tmp_path / "run.json").read_text())
    assert [item["status"] for item in report["items"]] == ["done", "failed", "done"]
    for item in report["items"][::2]:
        sidecar = json.loads(Path(item["file"]).with_suffix(".json").read_text())
        assert ", worker " in sidecar["worker"] and sidecar["device"] == "cpu"
    assert (tmp_path / "sheet.png").is_file() and not list(tmp_path.glob(".*"))
    assert main([*words, "--output", str(tmp_path), "--resume"]) == 1  # another engine adopts what is there
    assert capsys.readouterr().out.count("already there") == 2


def test_ray_workers_make_the_bytes_of_one_process_though_one_is_killed(words, alone, tmp_path, capsys, monkeypatch):
    pytest.importorskip("ray")
    recipe_of = item_worker.recipe_of

    def dying(*given):
        return replace(recipe_of(*given), maker="tests._support.stub_workers:make_dying")

    monkeypatch.setattr(item_worker, "recipe_of", dying)
    assert main([*words, "--output", str(tmp_path), "--workers", "2", "--engine", "ray"]) == 1
    assert "1 of 3 items failed" in capsys.readouterr().err
    assert images(tmp_path) == alone
    sidecars = [json.loads(path.read_text()) for path in tmp_path.glob("0*.json")]
    assert all(", Ray worker " in one["worker"] for one in sidecars)
    assert main([*words, "--output", str(tmp_path), "--resume"]) == 1
    assert capsys.readouterr().out.count("already there") == 2


def test_shards_make_all_items_and_merge_makes_the_report(words, alone, tmp_path, capsys):
    for number in (2, 1):
        assert main([*words, "--output", str(tmp_path), "--shard", f"{number}/2"]) == (1 if number == 2 else 0)
    assert images(tmp_path) == alone and not (tmp_path / "run.json").exists() and not (tmp_path / "sheet.png").exists()
    capsys.readouterr()
    assert main(["merge", str(tmp_path)]) == 1
    assert "1 of 3 items failed" in capsys.readouterr().err
    report = json.loads((tmp_path / "run.json").read_text())
    assert [item["index"] for item in report["items"]] == [0, 1, 2] and report["done"] == 2 and "shard" not in report
    assert (tmp_path / "sheet.png").is_file()
    (tmp_path / f"{next(iter(alone))}").unlink()
    assert main(["merge", str(tmp_path)]) == 2 and "is missing; copy the files" in capsys.readouterr().err


def shard_report(folder: Path, number: int, count: int, jobs: str = "a") -> None:
    data = {"shard": {"number": number, "count": count, "jobs": jobs, "items": 0}, "items": []}
    (folder / f"run-{number}-of-{count}.json").write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("parts", "why"),
    [
        ([], "has no report of a part"),
        ([(1, 3), (2, 3)], "run-3-of-3.json is not in"),
        ([(3, 3)], r"run-1-of-3.json \(and 1 others\) is not in"),
        ([(1, 2), (2, 2), (1, 4)], "run-1-of-2.json and run-1-of-4.json overlap"),
        ([(1, 2), (2, 2, "b")], "run-1-of-2.json and run-2-of-2.json in .* are parts of different jobs"),
    ],
)
def test_parts_that_do_not_fit_together_are_one_line(tmp_path, capsys, parts, why):
    from dit_attn.cli.shard_reports import read_shards

    for part in parts:
        shard_report(tmp_path, *part)
    with pytest.raises(DitAttnError, match=why):
        read_shards(tmp_path, ("run.json",))
    assert main(["merge", str(tmp_path)]) == 2 and len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("text", ["{", "[]", '{"shard": {"number": 2, "count": 1, "jobs": "a"}}', '{"shard": 1}'])
def test_a_report_that_is_none_is_one_line(tmp_path, capsys, text):
    (tmp_path / "run-1-of-1.json").write_text(text)
    assert main(["merge", str(tmp_path)]) == 2
    assert "run-1-of-1.json is not the report of part 1/1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"workers": "0"}, "--workers must be auto or a number"),
        ({"workers": "many"}, "--workers must be auto or a number"),
        ({"workers": "99999999999"}, "--workers must be auto or a number"),
        ({"engine": "dask"}, "unknown --engine 'dask'"),
        ({"engine": "local:10.0.0.1"}, "takes no address"),
        ({"shard": "0/2"}, "numbered from 1"),
    ],
)
def test_flags_that_make_no_sense_are_refused(values, why):
    with pytest.raises(DitAttnError, match=why):
        engines.from_options(Options(values))


def test_a_missing_library_and_a_launcher_besides_are_refused(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DitAttnError, match=r"pip install 'dit-attn\[ray\]'"):
        engines.from_options(Options({"engine": "ray"}))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(DitAttnError, match="2 processes were started by a launcher"):
        engines.from_options(Options({"workers": "2"}))


def test_workers_answer_several_times_and_an_interruption_leaves_neither_them_nor_a_file(tmp_path):
    device, pids = SimpleNamespace(type="cpu", index=None), set()
    recipe = Recipe("tests._support.stub_workers:make")
    with (
        pytest.raises(KeyboardInterrupt),
        engines.EngineConfig(workers=2).answering(recipe, tmp_path, device) as answers,
    ):
        assert list(answers([])) == [] and not list(tmp_path.iterdir())  # nobody was started
        for words in ("ab", "cde"):
            found = dict(answers([("say", word) for word in words]))
            assert [found[i]["value"] for i in range(len(words))] == list(words)
            pids |= {one["pid"] for one in found.values()}
        assert len(pids) <= 2 and len(list(tmp_path.iterdir())) == 1
        for _ in answers([("say", "f"), ("wait", str(tmp_path / "half"))]):
            raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_this_process_is_the_default():
    assert engines.from_options(Options({})) == (None, None)
    assert engines.from_options(Options({"engine": "local"})) == (None, None)
    assert engines.from_options(Options({"workers": "auto"}))[0] == engines.EngineConfig()


def test_visible_gpus_are_named_as_the_environment_names_them(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert engines.visible_gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a, 5")
    assert engines.visible_gpus() == ["GPU-a", "5"]


def test_workers_that_would_make_other_items_are_refused(tmp_path):
    setup = {"model": "mine", "fingerprint": "1", "methods": ({"method": "saas"},)}
    run = SimpleNamespace(setup=setup)
    check_same_setup(run, json.loads(json.dumps(setup)), "node7")
    with pytest.raises(DitAttnError, match="node7 has another fingerprint"):
        check_same_setup(run, {**setup, "fingerprint": "2"}, "node7")
    with engines.marked(tmp_path) as mark:
        engines.check_marked(tmp_path, mark, "node7")
        with pytest.raises(DitAttnError, match="give a folder that all machines share"):
            engines.check_marked(tmp_path / "other", mark, "node7")
    assert not list(tmp_path.iterdir())
