"""File systems of fsspec for tests: one that several processes see and that renames, and one that loses requests."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, ClassVar

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

ENTRY = "[fsspec.specs]\nshared = tests._support.address_systems:SharedFiles\n"


class SharedFiles(LocalFileSystem):
    """``shared:///folder``: the files of this machine, and not what ``file://`` is made into."""

    protocol = "shared"

    @classmethod
    def _strip_protocol(cls, path: Any) -> str:
        return super()._strip_protocol(str(path).removeprefix("shared://"))

    def unstrip_protocol(self, name: str) -> str:
        return f"shared://{self._strip_protocol(name)}"


class FailingFiles(MemoryFileSystem):
    """``failing://folder``: a memory whose next requests raise what is in ``errors``; ``None`` lets one through."""

    protocol = "failing"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    errors: ClassVar[list[BaseException | None]] = []
    requests: ClassVar[list[str]] = []

    @classmethod
    def _strip_protocol(cls, path: Any) -> str:
        return super()._strip_protocol(str(path).replace("failing://", "memory://", 1))

    def _met(self, name: str) -> None:
        self.requests.append(name)
        error = self.errors.pop(0) if self.errors else None
        if error is not None:
            raise error

    def info(self, path: str, **kwargs: Any) -> Any:
        self._met("info")
        return super().info(path, **kwargs)

    def cat_file(self, path: str, *args: Any, **kwargs: Any) -> Any:
        self._met("cat_file")
        return super().cat_file(path, *args, **kwargs)

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> Any:
        self._met("pipe_file")
        return super().pipe_file(path, value, mode=mode, **kwargs)


def register() -> None:
    """Make both known in this process, empty."""
    fsspec.register_implementation("shared", SharedFiles, clobber=True)
    fsspec.register_implementation("failing", FailingFiles, clobber=True)
    FailingFiles.store.clear()
    FailingFiles.errors.clear()
    FailingFiles.requests.clear()
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


def install(folder: Path) -> str:
    """Write into ``folder`` what makes :class:`SharedFiles` known in other processes; return a ``PYTHONPATH``."""
    about = folder / "shared_files-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: shared-files\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(ENTRY)
    root = str(Path(__file__).resolve().parents[2])
    return os.pathsep.join([str(folder), root])
