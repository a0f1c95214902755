"""Places at an fsspec address: what they name, that files appear whole, what is said where nothing is reached."""

from __future__ import annotations

import errno
import importlib.util
import pickle
from pathlib import Path

import fsspec
import pytest
from fsspec.registry import known_implementations

from dit_attn import files, remote
from dit_attn.errors import DitAttnError
from dit_attn.remote import RemotePath, Unreachable, check_reachable, parse_address
from tests._support import address_systems
from tests._support.address_systems import FailingFiles


@pytest.fixture(autouse=True)
def systems(monkeypatch: pytest.MonkeyPatch) -> None:
    address_systems.register()
    monkeypatch.setattr(remote, "PAUSES", (0.0, 0.0))


@pytest.fixture(params=["memory", "shared"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> RemotePath:
    """A folder that puts files directly, and one that renames."""
    place = parse_address("memory://run/a/" if request.param == "memory" else f"shared://{tmp_path}/run/", "--output")
    assert isinstance(place, RemotePath)
    place.mkdir()
    return place


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("sftp://me:secret@host/x", "sftp://...: the address holds a password"),
        ("s3://", "names no folder"),
        ("memory:///", "names no folder"),
        ("s3://bucket/a\nb", "names no folder"),
        ("simplecache::s3://bucket/x", "is a chain of file systems"),
        ("file://out/x", "write file:///folder with three slashes"),
    ],
)
def test_an_address_that_is_none_is_one_line(text: str, why: str) -> None:
    with pytest.raises(DitAttnError, match=why) as caught:
        parse_address(text, "--output")
    assert "secret" not in str(caught.value)


def test_addresses_are_told_from_paths() -> None:
    assert all(map(remote.is_address, ("s3://b/x", "memory://x", "file:///x", "a+b.c://x")))
    assert not any(map(remote.is_address, ("s3/x", "/a://b", "C://x", "outputs/x", "s3:/b")))
    assert parse_address("file:///tmp/a", "--output") == Path("/tmp/a")
    assert remote.place_of("s3://b/x") == RemotePath("s3://b/x") and remote.place_of("a/b") == Path("a/b")


def test_it_is_taken_apart_as_a_path_is() -> None:
    file = parse_address("s3://bucket/run/", "--output") / "dense" / "a.b.png"
    assert str(file) == "s3://bucket/run/dense/a.b.png" and (file.name, file.suffix) == ("a.b.png", ".png")
    assert str(file.with_suffix(".json")) == "s3://bucket/run/dense/a.b.json" and file.parent.name == "dense"
    assert remote.relative_to(file, RemotePath("s3://bucket/run")) == "dense/a.b.png"
    assert pickle.loads(pickle.dumps(file)) == file
    with pytest.raises(ValueError, match="is not in"):
        file.relative_to(RemotePath("s3://bucket/ru"))
    with pytest.raises(TypeError):
        Path(file)  # no library takes it for a local file


def test_files_are_put_read_listed_and_removed(folder: RemotePath, tmp_path: Path) -> None:
    assert folder.names() == set() and (folder / "none").names() == set() and not (folder / "a.txt").exists()
    files.write_text(folder / "a.txt", "ä")
    files.write_json(folder / "b.json", {"x": 1}, indent=None)
    (tmp_path / "local").write_bytes(b"12345")
    (folder / "c.bin").put(tmp_path / "local")
    assert folder.names() == {"a.txt", "b.json", "c.bin"} == remote.names_in(folder)
    assert files.read_regular(folder / "a.txt") == "ä".encode() and remote.size_of(folder / "c.bin") == 5
    assert (folder / "a.txt").is_file() and folder.is_dir() and not folder.is_file()
    with remote.local_copy(folder / "b.json") as copy:
        assert copy.suffix == ".json" and copy.read_text() == '{"x": 1}\n'
    assert not copy.exists()
    (folder / "a.txt").write_bytes(b"new")
    assert (folder / "a.txt").read_bytes() == b"new"
    (folder / "a.txt").unlink()
    (folder / "a.txt").unlink(missing_ok=True)
    assert not (folder / "a.txt").exists()
    for read in (RemotePath.read_bytes, RemotePath.size, RemotePath.unlink):
        with pytest.raises(FileNotFoundError):
            read(folder / "a.txt")


def test_a_file_is_created_only_where_there_is_none(folder: RemotePath) -> None:
    assert (folder / "a").create(b"first") and not (folder / "a").create(b"second")
    assert (folder / "a").read_bytes() == b"first"


def test_a_file_system_without_creation_is_asked_before(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = fsspec.AbstractFileSystem.pipe_file

    def older(self: object, path: str, value: bytes, **kwargs: object) -> None:
        if kwargs:
            raise TypeError("unexpected keyword argument 'mode'")
        plain(self, path, value)

    monkeypatch.setattr(fsspec.get_filesystem_class("memory"), "pipe_file", older)
    assert RemotePath("memory://x/a").create(b"first") and not RemotePath("memory://x/a").create(b"second")
    assert RemotePath("memory://x/a").read_bytes() == b"first"


def test_what_fails_on_the_way_leaves_the_old_file_and_no_temporary_one(
    folder: RemotePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "a").write_bytes(b"old")
    with pytest.raises(RuntimeError), files.atomic_path(folder / "a") as temporary:
        temporary.write_bytes(b"half")
        raise RuntimeError
    system = type(remote._opened(str(folder))[0])
    if remote._renames(remote._opened(str(folder))[0]):
        monkeypatch.setattr(system, "mv", lambda self, old, new: (_ for _ in ()).throw(ConnectionError("lost")))
        monkeypatch.setattr(system, "exists", lambda self, path: False)
        with pytest.raises(Unreachable, match="lost"):
            (folder / "a").write_bytes(b"new")
    assert (folder / "a").read_bytes() == b"old" and folder.names() == {"a"}


def test_a_file_system_that_renames_to_free_names_alone_replaces_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    system, move = address_systems.SharedFiles, address_systems.SharedFiles.mv

    def to_free_names(self: object, old: str, new: str) -> None:
        if Path(new).exists():
            raise OSError(errno.EEXIST, "there is one")
        move(self, old, new)

    monkeypatch.setattr(system, "mv", to_free_names)
    file = RemotePath(f"shared://{tmp_path}/a")
    file.write_bytes(b"old")
    file.write_bytes(b"new")
    assert file.read_bytes() == b"new" and file.parent.names() == {"a"}


def test_a_request_that_is_lost_is_made_again_and_what_is_final_is_not() -> None:
    file = RemotePath("failing://x/a")
    FailingFiles.errors[:] = [ConnectionError("lost"), RuntimeError("throttled"), None]
    file.write_bytes(b"1")
    assert FailingFiles.requests == ["pipe_file"] * 3 and file.read_bytes() == b"1"
    FailingFiles.errors[:] = [RuntimeError("down")] * 3
    with pytest.raises(Unreachable, match="RuntimeError: down"):
        file.read_bytes()
    FailingFiles.requests.clear()
    FailingFiles.errors[:] = [PermissionError("denied")]
    with pytest.raises(Unreachable, match="denied"):
        file.write_bytes(b"2")
    FailingFiles.errors[:] = [FileNotFoundError("no such bucket")]
    with pytest.raises(Unreachable, match="no such bucket"):  # a put does not miss its file
        file.write_bytes(b"2")
    with pytest.raises(FileNotFoundError):
        RemotePath("failing://x/b").read_bytes()
    assert FailingFiles.requests == ["pipe_file", "pipe_file", "cat_file"]


def test_what_cannot_be_reached_is_one_line_and_nothing_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    def why(address: str) -> str:
        with pytest.raises(DitAttnError) as caught:
            check_reachable(parse_address(address, "--output"), "--output")
        return str(caught.value)

    assert "fsspec knows no protocol 'nothing'" in why("nothing://x")
    monkeypatch.setitem(known_implementations, "absent", {"class": "absent.FS", "err": "Install absent"})
    assert "needs a library of the protocol absent (Install absent); install it" in why("absent://x")
    FailingFiles.errors[:] = [RuntimeError("Unable to locate credentials\nmore")]
    assert why("failing://x") == (
        "cannot reach --output failing://x (RuntimeError: Unable to locate credentials); check the address, the "
        "network and the credentials"
    )
    RemotePath("failing://x/file").write_bytes(b"1")
    assert "is a file; give a folder" in why("failing://x/file")
    FailingFiles.requests.clear()
    check_reachable(RemotePath("failing://x/new"), "--output")
    check_reachable(Path("/absent"), "--output")
    assert FailingFiles.requests == ["info"]
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "fsspec" else find(name))
    assert "needs the library fsspec, which is not installed: `pip install 'dit-attn[remote]'`" in why("s3://b/x")


def test_locks_are_for_folders_of_this_machine() -> None:
    folder = RemotePath("memory://locks")
    with files.locked(folder):
        files.claim(object(), folder, "compare", "comparing")
    assert folder.names() == set()
