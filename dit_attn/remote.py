"""Files at an fsspec address (``s3://bucket/run``, ``memory://run``): the part of ``pathlib.Path`` that outputs need.

A file is put as a whole. Object stores show it once it is complete; file systems that can rename get it under a
temporary name first. Nothing of fsspec is imported before an address is used.
"""

from __future__ import annotations

import errno
import importlib.util
import re
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from dit_attn.errors import DitAttnError, cut, reason, shorten

T = TypeVar("T")
TEMPORARY = ".partial-"
"""First characters of every temporary name; a killed process may leave such files behind."""
PAUSES = (1.0, 4.0)
"""Seconds before a request that failed is made again."""
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.:-]+)://(.*)", re.DOTALL)
_PASSWORD = re.compile(r"[^/@]*:[^/@]*@")
_LOCAL = ("file", "local")
_FINAL = (PermissionError, IsADirectoryError, NotADirectoryError, NotImplementedError, ImportError, ValueError)


class Unreachable(OSError):
    """A request to an address failed, and not because there is no such file; ``filename`` is the address."""


@dataclass(frozen=True)
class RemotePath:
    """A file or folder at an address.

    Its methods are those of ``pathlib.Path``; each is a request, or several. They raise ``FileNotFoundError`` where
    there is no such file, else :class:`Unreachable`. Nothing is listed from a cache.

    Attributes:
        address: protocol and place, without a slash at the end.
    """

    address: str

    def __str__(self) -> str:
        return self.address

    def __truediv__(self, name: str | PurePosixPath) -> RemotePath:
        return RemotePath(f"{self.address}/{name}")

    @property
    def name(self) -> str:
        """What follows the last slash."""
        return self.address.rpartition("/")[2]

    @property
    def suffix(self) -> str:
        """The ending of the name, with its dot."""
        return PurePosixPath(self.name).suffix

    @property
    def parent(self) -> RemotePath:
        """The folder it is in."""
        return RemotePath(self.address.rpartition("/")[0])

    def with_suffix(self, suffix: str) -> RemotePath:
        """Return the path with another ending."""
        return self.parent / PurePosixPath(self.name).with_suffix(suffix).name

    def relative_to(self, other: RemotePath) -> PurePosixPath:
        """Return the way from a folder to it.

        Raises:
            ValueError: it is not in that folder.
        """
        if not self.address.startswith(f"{other.address}/"):
            raise ValueError(f"{self} is not in {other}")
        return PurePosixPath(self.address[len(other.address) + 1 :])

    def exists(self) -> bool:
        """Return whether there is a file or folder."""
        return self._info() is not None

    def is_file(self) -> bool:
        """Return whether there is a file."""
        info = self._info()
        return info is not None and info["type"] == "file"

    def is_dir(self) -> bool:
        """Return whether there is a folder; object stores have one where a file is in it."""
        info = self._info()
        return info is not None and info["type"] == "directory"

    def names(self) -> set[str]:
        """Return the names of what is in the folder; none where there is no folder."""

        def listed(system: Any, path: str) -> set[str]:
            system.invalidate_cache(path)
            found = {str(entry).rstrip("/") for entry in system.ls(path, detail=False)}
            return {entry.rpartition("/")[2] for entry in found - {path.rstrip("/")}}

        try:
            return self._request(listed, PAUSES)
        except FileNotFoundError:
            return set()

    def size(self) -> int:
        """Return the bytes of the file."""
        info = self._info()
        if info is None:
            raise FileNotFoundError(errno.ENOENT, "there is no such file", str(self))
        return int(info["size"] or 0)

    def read_bytes(self) -> bytes:
        """Return the content of the file."""
        return bytes(self._request(lambda system, path: system.cat_file(path), PAUSES))

    def write_bytes(self, data: bytes) -> None:
        """Put ``data``; a file that is there is replaced."""
        self._put(lambda system, path: system.pipe_file(path, data))

    def put(self, file: Path) -> None:
        """Put a local file; a file that is there is replaced."""
        self._put(lambda system, path: system.put_file(str(file), path))

    def create(self, data: bytes) -> bool:
        """Put ``data`` where there is no file; return whether that was so.

        It is one request where the file system knows such a thing, S3 for one; else a question and a request.
        """

        def created(system: Any, path: str) -> bool:
            try:
                system.pipe_file(path, data, mode="create")
            except FileExistsError:
                return False
            except TypeError:  # a file system that is older than the mode
                if self._info() is not None:
                    return False
                system.pipe_file(path, data)
            return True

        return self._written(created)

    def unlink(self, missing_ok: bool = False) -> None:
        """Remove the file."""
        try:
            self._request(lambda system, path: system.rm_file(path))
        except FileNotFoundError:
            if not missing_ok:
                raise

    def mkdir(self, parents: bool = True, exist_ok: bool = True) -> None:
        """Make the folder and those above it, in file systems that have folders; no bucket is ever made."""

        def made(system: Any, path: str) -> None:
            if _renames(system):
                system.makedirs(path, exist_ok=exist_ok)

        self._request(made)

    def _info(self) -> dict[str, Any] | None:
        def asked(system: Any, path: str) -> dict[str, Any]:
            system.invalidate_cache(path)
            return dict(system.info(path))

        try:
            return self._request(asked, PAUSES)
        except FileNotFoundError:
            return None

    def _put(self, write: Callable[[Any, str], Any]) -> None:
        def put(system: Any, path: str) -> None:
            if not _renames(system):
                write(system, path)
                return
            folder, _, name = path.rpartition("/")
            temporary = f"{folder}/{TEMPORARY}{uuid.uuid4().hex[:8]}{PurePosixPath(name).suffix}"
            try:
                write(system, temporary)
                _move(system, temporary, path)
            except BaseException:
                with suppress(Exception):
                    system.rm_file(temporary)
                raise

        self._written(put)

    def _written(self, write: Callable[[Any, str], T]) -> T:
        try:
            return self._request(write, PAUSES)
        except FileNotFoundError as error:  # the bucket or the folder, not the file
            raise Unreachable(errno.EIO, reason(error), self.address) from error

    def _request(self, action: Callable[[Any, str], T], pauses: Sequence[float] = ()) -> T:
        """Call ``action(file system, path)``; a connection that is lost is tried again after each of the pauses."""
        for pause in (*pauses, None):
            try:
                return action(*_opened(self.address))
            except FileNotFoundError:
                raise
            except Exception as error:  # every library has exceptions of its own
                if pause is None or isinstance(error, _FINAL):
                    raise Unreachable(errno.EIO, _said(error), self.address) from error
                time.sleep(pause)
        raise AssertionError("the last of the tries returns or raises")


Place = Path | RemotePath


def _opened(address: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    system, path = url_to_fs(address)
    return system, str(path)


def _renames(system: Any) -> bool:
    """Return whether a file system moves files by a request of its own, and not by a copy."""
    from fsspec import AbstractFileSystem

    return type(system).mv is not AbstractFileSystem.mv


def _move(system: Any, old: str, new: str) -> None:
    try:
        system.mv(old, new)
    except OSError:
        if not system.exists(new):
            raise
        system.rm_file(new)  # this one renames to free names alone
        system.mv(old, new)


def _said(error: Exception) -> str:
    return reason(error) if isinstance(error, OSError) else f"{type(error).__name__}: {reason(error)}"


# -- what a user gives -------------------------------------------------------------------------------------------------


def is_address(text: str) -> bool:
    """Return whether a text is an address, such as ``s3://bucket/run``, rather than a path."""
    return _ADDRESS.match(text) is not None


def place_of(text: str) -> Place:
    """Return the place that a recorded text names: an address or a path."""
    return RemotePath(text) if is_address(text) else Path(text)


def parse_address(text: str, what: str) -> Place:
    """Return the place of an address; ``file:///folder`` is a path. Nothing is imported or reached.

    Args:
        text: the address.
        what: where it was given, for messages, e.g. ``"--output"``.

    Raises:
        DitAttnError: it names no folder, holds a password, is a chain of file systems, or no absolute path of files.
    """
    found = _ADDRESS.fullmatch(text)
    protocol, rest = found.groups() if found is not None else ("", "")
    if _PASSWORD.match(rest):
        raise DitAttnError(
            f"{what} {protocol}://...: the address holds a password, which every record of the run would show; give it "
            "in fsspec's configuration (~/.config/fsspec/*.json) or in the environment"
        )
    if not rest.strip("/") or any(ord(letter) < 32 for letter in rest):
        raise DitAttnError(f"{what} {shorten(text)} names no folder; write it as s3://bucket/folder")
    if "::" in protocol:
        raise DitAttnError(f"{what} {shorten(text)} is a chain of file systems; give the address of the last one alone")
    if protocol in _LOCAL:
        if not rest.startswith("/"):
            raise DitAttnError(f"{what} {shorten(text)}: write file:///folder with three slashes, or the folder alone")
        return Path(rest)
    return RemotePath(f"{protocol}://{rest.rstrip('/')}")


def check_reachable(place: Place, what: str) -> None:
    """Refuse an address that nothing can be said of: a missing library, no connection, no rights. Nothing is written.

    Args:
        place: the folder; a path is left alone.
        what: where it was given, for messages.

    Raises:
        DitAttnError: so it is, or it is a file.
    """
    if isinstance(place, Path):
        return
    if importlib.util.find_spec("fsspec") is None:
        raise DitAttnError(
            f"{what} {place} needs the library fsspec, which is not installed: `pip install 'dit-attn[remote]'`"
        )
    import fsspec

    protocol = place.address.partition("://")[0]
    try:
        fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        raise DitAttnError(
            f"{what} {place} needs a library of the protocol {protocol} ({cut(reason(error), 100)}); install it, or "
            "give a local folder"
        ) from error
    except ValueError as error:
        raise DitAttnError(
            f"{what} {place}: fsspec knows no protocol {protocol!r}; use one such as s3, gs, abfs or sftp"
        ) from error
    try:
        info = place._request(lambda system, path: system.info(path))
    except FileNotFoundError:
        return
    except OSError as error:
        raise unreachable(what, place, error) from error
    if info["type"] == "file":
        raise DitAttnError(f"{what} {place} is a file; give a folder")


def unreachable(what: str, place: Place, error: OSError) -> DitAttnError:
    """Return the error for an address that cannot be reached or written."""
    return DitAttnError(
        f"cannot reach {what} {place} ({cut(reason(error), 200)}); check the address, the network and the credentials"
    )


# -- for code that takes either ----------------------------------------------------------------------------------------


def names_in(folder: Place) -> set[str]:
    """Return the names of what is in a folder."""
    return folder.names() if isinstance(folder, RemotePath) else {path.name for path in folder.iterdir()}


def relative_to(file: Place, folder: Place) -> str:
    """Return the way from a folder to a file in it."""
    if isinstance(file, RemotePath):
        assert isinstance(folder, RemotePath)
        return str(file.relative_to(folder))
    return str(file.relative_to(str(folder)))


def size_of(file: Place) -> int:
    """Return the bytes of a file."""
    return file.size() if isinstance(file, RemotePath) else file.stat().st_size


@contextmanager
def local_copy(file: Place) -> Iterator[Path]:
    """Yield a local file with the content of ``file`` and its suffix, for libraries that open paths.

    Raises:
        OSError: it is not there, or cannot be read.
    """
    if isinstance(file, Path):
        yield file
        return
    with local_folder() as folder:
        copy = folder / file.name
        copy.write_bytes(file.read_bytes())
        yield copy


@contextmanager
def local_folder() -> Iterator[Path]:
    """Yield a temporary folder of this machine, for files on their way to an address or from it."""
    with tempfile.TemporaryDirectory(prefix="dit-attn-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)
