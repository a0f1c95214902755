"""Files and texts of a user: atomic writes, locks, paths, JSON and YAML; what fails is one line with what to do."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import uuid
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dit_attn.errors import DitAttnError, cut, reason, shorten
from dit_attn.remote import TEMPORARY, Place, RemotePath, local_folder

try:
    import fcntl
except ImportError:  # Windows: without locks, one process at a time is up to the user
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock-"
"""First characters of the name of a lock file, which exists while its lock is held."""
_LARGEST = 200_000  # values of one JSON or YAML text, aliases written out
_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)


@contextmanager
def atomic_path(path: Place) -> Iterator[Path]:
    """Yield a temporary path in the folder of ``path``; rename it to ``path`` at the end, or delete it on an exception.

    The temporary name is unique, hidden and has the suffix of ``path``, so that writers that go by suffix work. For an
    address it is in a temporary folder of this machine, and its content is put there at the end.

    Raises:
        OSError: the write, the rename or the put failed; an old file at ``path`` is unchanged.
    """
    if isinstance(path, RemotePath):
        with local_folder() as folder:
            yield folder / path.name
            path.put(folder / path.name)
        return
    temporary = path.with_name(f"{TEMPORARY}{uuid.uuid4().hex[:8]}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty temporary folder inside ``folder``; at the end, move its entries into ``folder`` one by one.

    An entry replaces the old one of its name; other entries of ``folder`` stay. On an exception nothing is moved.
    """
    folder.mkdir(parents=True, exist_ok=True)
    staging = folder / f"{TEMPORARY}{uuid.uuid4().hex[:8]}"
    staging.mkdir()
    try:
        yield staging
        for entry in sorted(staging.iterdir()):
            target = folder / entry.name
            if target.is_dir() and not target.is_symlink():
                shutil.rmtree(target)
            os.replace(entry, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def write_text(path: Place, text: str) -> None:
    """Write ``text`` as UTF-8, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def append_text(path: Path, text: str) -> None:
    """Append ``text`` as UTF-8 to a file that is there.

    Raises:
        OSError: it is not there or cannot be written, or it is a link.
    """
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_APPEND | _NO_FOLLOW), "a", encoding="utf-8") as file:
        file.write(text)


def write_bytes(path: Place, data: bytes) -> None:
    """Write ``data``, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: Place, data: Any, indent: int | None = 1) -> None:
    """Write ``data`` as JSON with a newline at the end, atomically; what JSON does not know is written as ``str``."""
    write_text(path, json.dumps(data, indent=indent, default=str) + "\n")


@contextmanager
def report_os_error(action: str, remedy: str, kind: type[DitAttnError] = DitAttnError) -> Iterator[None]:
    """Turn an ``OSError`` of the block into ``kind("cannot ACTION (reason); REMEDY")``.

    Args:
        action: what the block does, e.g. ``"write out/results.json"``.
        remedy: what the user can do.
        kind: class of the error.
    """
    try:
        yield
    except OSError as error:
        raise kind(f"cannot {action} ({reason(error)}); {remedy}") from error


# -- locks -------------------------------------------------------------------------------------------------------------


@contextmanager
def locked(folder: Place, name: str = "folder") -> Iterator[None]:
    """Hold the lock ``name`` of a folder for the length of the block; other processes wait for it.

    The system frees it when the process ends, however it ends. Where the file system has no locks there is none, and
    an address has none.
    """
    if isinstance(folder, RemotePath):
        yield
        return
    held = _lock(folder / f"{LOCK}{name}", wait=True)
    try:
        yield
    finally:
        if held is not None:
            _unlock(folder / f"{LOCK}{name}", held)


def claim(owner: Any, folder: Place, name: str, what: str) -> None:
    """Take the lock ``name`` of a folder for this process, for as long as ``owner`` lives; an address has none.

    Args:
        owner: any object; several of one process may share a lock.
        folder, name: the lock.
        what: what the process that has it does, for the message.

    Raises:
        DitAttnError: another process has it.
    """
    if isinstance(folder, RemotePath):
        return
    path = folder.resolve() / f"{LOCK}{name}"
    if path not in _CLAIMED:
        try:
            _CLAIMED[path] = [_lock(path, wait=False), 0]
        except BlockingIOError as error:
            raise DitAttnError(
                f"another process is {what} in {folder}; wait until it ends, or give another --output"
            ) from error
    _CLAIMED[path][1] += 1
    weakref.finalize(owner, _release, path)


_CLAIMED: dict[Path, list[Any]] = {}  # descriptor, owners


def _release(path: Path) -> None:
    _CLAIMED[path][1] -= 1
    if not _CLAIMED[path][1] and (held := _CLAIMED.pop(path)[0]) is not None:
        _unlock(path, held)


def _lock(path: Path, wait: bool) -> int | None:
    """A descriptor that holds the lock, ``None`` where there are no locks."""
    if fcntl is None:
        return None
    while True:
        held = os.open(path, os.O_RDWR | os.O_CREAT | _NO_FOLLOW | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(held, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            os.close(held)
            if isinstance(error, BlockingIOError):
                raise
            path.unlink(missing_ok=True)
            return None
        if _is_at(path, held):
            return held
        os.close(held)  # the process that had it has removed the file since


def _is_at(path: Path, held: int) -> bool:
    try:
        return os.path.samestat(os.fstat(held), os.lstat(path))
    except FileNotFoundError:
        return False


def _unlock(path: Path, held: int) -> None:
    with suppress(OSError):
        path.unlink(missing_ok=True)
    os.close(held)


# -- what a user gives -------------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Return the package's folder in the user's cache folder; it need not exist."""
    cache = os.environ.get("XDG_CACHE_HOME", "")  # to be ignored where it is relative, by its specification
    return (Path(cache) if os.path.isabs(cache) else Path("~/.cache").expanduser()) / "dit_attn"


def user_path(text: str | Path, what: str) -> Path:
    """Return a path as the user means it, ``~`` expanded.

    Args:
        text: the path.
        what: where it was given, for messages, e.g. ``"--output"``.

    Raises:
        DitAttnError: an unknown home, a name longer than the system's, or a zero byte.
    """
    try:
        path = Path(text).expanduser()
        path.exists()
    except RuntimeError as error:
        raise DitAttnError(f"{what} {shorten(str(text))}: there is no such home folder; write the path out") from error
    except (OSError, ValueError) as error:
        raise DitAttnError(f"{what} {shorten(str(text))} is no path ({reason(error)}); check it") from error
    if "\0" in str(path):  # newer Pythons are silent about this and about long names
        raise DitAttnError(f"{what} {shorten(str(text))} is no path (it has a zero byte); check it")
    if any(len(os.fsencode(part)) > 255 for part in path.parts):
        raise DitAttnError(f"{what} {shorten(str(text))} is no path (File name too long); check it")
    return path


def parse_json(text: str | bytes) -> Any:
    """Parse JSON.

    Raises:
        ValueError: not JSON, nested too deeply, or a number with too many digits; the message is one short line.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except json.JSONDecodeError:
        raise
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text: {error.reason}") from None
    except ValueError:  # of the interpreter's limit for whole numbers
        raise ValueError("a number has too many digits") from None


def parse_yaml(text: str) -> Any:
    """Parse YAML (or JSON) without tags of its own.

    Raises:
        ValueError: not YAML, nested too deeply, a value out of range, or aliases that refer to themselves or expand to
            more values than memory holds; the message is a short clause, with the line number where it is known.
    """
    import yaml

    try:
        data = yaml.safe_load(text)
        count = _count(data, {})
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = cut(str(getattr(error, "problem", None) or error), 200)
        raise ValueError(f"{f'line {mark.line + 1}' if mark else 'it'} is not YAML ({problem})") from None
    except (ValueError, TypeError, AttributeError, OverflowError) as error:  # a date in month 13, 5000 digits
        raise ValueError(f"a value is out of range ({reason(error)})") from None
    if count > _LARGEST:
        raise ValueError(f"its aliases expand to more than {_LARGEST:,} values")
    return data


def _count(data: Any, known: dict[int, int]) -> int:
    """Values in nested lists and mappings, shared ones as often as they occur."""
    if not isinstance(data, (list, dict)):
        return 1
    if id(data) not in known:
        known[id(data)] = _LARGEST + 1  # of an alias to what it is in
        parts = data if isinstance(data, list) else data.values()
        known[id(data)] = 1 + sum(_count(part, known) for part in parts)
    return known[id(data)]


def read_regular(path: Place) -> bytes:
    """Read a file that a folder of ours holds.

    Raises:
        OSError: there is none, it cannot be reached, or it is a link, a pipe or a device.
    """
    if isinstance(path, RemotePath):
        return path.read_bytes()
    with os.fdopen(os.open(path, os.O_RDONLY | _NO_FOLLOW | getattr(os, "O_NONBLOCK", 0)), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        return file.read()


def write_checkpoint(path: Path, state: dict[str, Any], kind: type[DitAttnError] = DitAttnError) -> None:
    """Write the state of a training, atomically; its folder is made.

    Raises:
        DitAttnError: of the given kind: the disk is full or the folder cannot be written; the previous file stays.
    """
    import torch

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            torch.save(state, temporary)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        raise kind(
            f"cannot write the checkpoint to {path.parent} ({reason(error)}); free some space there, the previous "
            "checkpoint is intact"
        ) from error


def read_weights(file: Path) -> dict[str, Any]:
    """Read a weights file from outside as data: safetensors, or a state dict without code in it.

    Raises:
        DitAttnError: it holds anything else than tensors.
    """
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(file))
        import torch

        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken file raises anything
        raise DitAttnError(
            f"{file} is no file of weights alone: it is broken, or holds code ({type(error).__name__}); save a state "
            "dict, or safetensors"
        ) from error
    if not isinstance(state, dict):
        raise DitAttnError(f"{file} holds a {type(state).__name__} and no state dict; save model.state_dict()")
    return state


def is_place(name: str) -> bool:
    """Return whether a text names saved settings (a file, a folder, ``org/name``) rather than a method's slug."""
    return "/" in name or name.endswith(".json") or os.path.isdir(name)
