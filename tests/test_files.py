"""Files are written completely or not at all, and nothing that was there is lost."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dit_attn import files
from dit_attn.errors import DitAttnError, RunStopped


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    "write, expected",
    [
        (lambda path: files.write_text(path, "schön 猫\n"), "schön 猫\n".encode()),
        (lambda path: files.write_bytes(path, b"\x00\xff"), b"\x00\xff"),
        (lambda path: files.write_json(path, {"a": [1, Path("b")]}), b'{\n "a": [\n  1,\n  "b"\n ]\n}\n'),
    ],
    ids=["text", "bytes", "json"],
)
def test_a_write_replaces_the_old_file_and_leaves_nothing_else(tmp_path: Path, write: Any, expected: bytes) -> None:
    (tmp_path / "a.txt").write_text("old")
    write(tmp_path / "a.txt")
    assert (tmp_path / "a.txt").read_bytes() == expected and names(tmp_path) == ["a.txt"]


def test_the_target_is_untouched_until_the_block_ends(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("old")
    with files.atomic_path(tmp_path / "a.json") as temporary:
        temporary.write_text("new")
        assert (tmp_path / "a.json").read_text() == "old"
        assert temporary.parent == tmp_path and temporary.suffix == ".json"
        assert temporary.name.startswith(files.TEMPORARY) and temporary.name.startswith(".")
    assert (tmp_path / "a.json").read_text() == "new"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device"), ValueError()])
def test_a_block_that_fails_leaves_the_old_file_only(tmp_path: Path, error: BaseException) -> None:
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(type(error)), files.atomic_path(tmp_path / "a.txt") as temporary:
        temporary.write_text("half")
        raise error
    assert (tmp_path / "a.txt").read_text() == "old" and names(tmp_path) == ["a.txt"]


def test_a_value_that_is_no_json_leaves_the_old_file(tmp_path: Path) -> None:
    loop: list[Any] = []
    loop.append(loop)
    files.write_json(tmp_path / "a.json", {"old": 1})
    with pytest.raises(ValueError, match="Circular"):
        files.write_json(tmp_path / "a.json", loop)
    assert json.loads((tmp_path / "a.json").read_text()) == {"old": 1} and names(tmp_path) == ["a.json"]


def test_two_writers_of_one_file_do_not_share_a_temporary_name(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 250 + ".txt")  # a temporary name that grew with the target's would be too long
    with files.atomic_path(path) as first, files.atomic_path(path) as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first"  # the last one to end


def test_a_file_has_the_mode_of_any_new_file(tmp_path: Path) -> None:
    files.write_text(tmp_path / "a", "x")
    (tmp_path / "b").write_text("x")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_a_folder_is_replaced_entry_by_entry_and_keeps_what_is_not_written(tmp_path: Path) -> None:
    (tmp_path / "part").mkdir()
    (tmp_path / "part/old").write_text("old")
    (tmp_path / "kept").write_text("kept")
    with files.atomic_folder(tmp_path) as staging:
        (staging / "part").mkdir()
        (staging / "part/new").write_text("new")
        assert names(tmp_path / "part") == ["old"]
    assert names(tmp_path) == ["kept", "part"] and names(tmp_path / "part") == ["new"]


def test_a_folder_that_fails_is_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    with pytest.raises(KeyboardInterrupt), files.atomic_folder(tmp_path) as staging:
        (staging / "a").write_text("new")
        raise KeyboardInterrupt
    assert names(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "old"


def test_a_failure_of_the_file_system_is_one_line_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(DitAttnError) as caught, files.report_os_error("write it", "give another folder"):
        files.write_text(tmp_path / "file/inside", "x")
    assert str(caught.value) == "cannot write it (Not a directory); give another folder"
    full = files.report_os_error("write it", "free disk space", RunStopped)
    with pytest.raises(RunStopped, match=r"cannot write it \(No space left on device\); free disk space"), full:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_lock_is_free_again_when_its_process_is_killed(tmp_path: Path) -> None:
    code = f"""
import os, pathlib, signal
from dit_attn import files
class Owner: pass
owner = Owner()
files.claim(owner, pathlib.Path({str(tmp_path)!r}), "log", "measuring")
print("ready", flush=True)
input()
os.kill(os.getpid(), signal.SIGKILL)
"""
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdin is not None and child.stdout is not None and child.stdout.readline() == "ready\n"

    class Owner:
        pass

    owner, other = Owner(), Owner()
    with pytest.raises(DitAttnError, match=r"another process is measuring in .*; wait until it ends, or give another"):
        files.claim(owner, tmp_path, "log", "measuring")
    child.communicate("\n", timeout=60)
    files.claim(owner, tmp_path, "log", "measuring")
    files.claim(other, tmp_path, "log", "measuring")  # the same process
    assert names(tmp_path) == [".lock-log"]
    del owner
    assert names(tmp_path) == [".lock-log"]
    del other
    assert names(tmp_path) == []


def test_a_lock_file_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("precious")
    (tmp_path / ".lock-folder").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError), files.locked(tmp_path):
        pass
    assert (tmp_path / "victim").read_text() == "precious"


def test_text_is_not_appended_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "log").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError):
        files.append_text(tmp_path / "log", "more")
    with pytest.raises(OSError):
        files.read_regular(tmp_path / "log")
    assert (tmp_path / "victim").read_text() == "precious"


def test_a_pipe_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a regular file"):
        files.read_regular(tmp_path / "pipe")


@pytest.mark.parametrize(
    "text, words",
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"seed": ' + "9" * 5000 + "}", "too many digits"),
        (b"\xff\xfe\xfd", "not UTF-8"),
        ("{half", "Expecting property name"),
    ],
    ids=["deep", "digits", "bytes", "half"],
)
def test_json_that_cannot_be_parsed_is_one_short_line(text: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        files.parse_json(text)
    assert len(str(caught.value)) < 200


def bomb(levels: int) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    "text, words",
    [
        (bomb(9), "aliases expand to more than"),
        ("a: &a [*a]", "aliases expand to more than"),
        ("[" * 50_000, "nested too deeply"),
        ("a: [1", "line 1 is not YAML"),
        ("a: 2020-13-45", "out of range"),
        ("a: " + "9" * 5000, "out of range"),
        ("!!python/object:os.system x", "line 1 is not YAML"),
    ],
    ids=["bomb", "itself", "deep", "half", "date", "digits", "tag"],
)
def test_yaml_that_cannot_be_parsed_is_one_short_line(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        files.parse_yaml(text)
    assert len(str(caught.value)) < 300


def test_yaml_and_aliases_of_a_usual_size_are_read() -> None:
    assert files.parse_yaml("a: &a [1, 2]\nb: [*a, *a]") == {"a": [1, 2], "b": [[1, 2], [1, 2]]}


@pytest.mark.parametrize(
    "text, words", [("~nosuch/x", "no such home"), ("x" * 300, "File name too long"), ("a\0b", "no path")]
)
def test_a_path_that_cannot_be_is_named_with_its_flag(text: str, words: str) -> None:
    with pytest.raises(DitAttnError, match=f"--output .*{words}") as caught:
        files.user_path(text, "--output")
    assert len(str(caught.value)) < 300 and files.user_path("~", "--output") == Path.home()


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("unexpected pos")])
@pytest.mark.parametrize("kind", [DitAttnError, RunStopped])
def test_a_checkpoint_that_cannot_be_written_is_one_line_and_leaves_the_last(tmp_path, monkeypatch, error, kind):
    path = tmp_path / "run" / "checkpoint.pt"
    files.write_checkpoint(path, {"step": 1})

    def fail(*_):
        raise error

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(DitAttnError, match=r"cannot write the checkpoint to .*previous checkpoint is intact$") as found:
        files.write_checkpoint(path, {"step": 2}, kind)
    assert type(found.value) is kind and os.listdir(path.parent) == [path.name]
    assert torch.load(path, weights_only=True) == {"step": 1}
