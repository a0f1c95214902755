"""Atomic writes: a file is written completely or not at all, and a failed write is one line that says what to do."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dit_attn.errors import DitAttnError, reason

TEMPORARY = ".partial-"
"""First characters of every temporary name; a killed process may leave such files behind."""


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of ``path``; rename it to ``path`` at the end, or delete it on an exception.

    The temporary name is unique, hidden and has the suffix of ``path``, so that writers that go by suffix work.

    Raises:
        OSError: the write or the rename failed; an old file at ``path`` is unchanged.
    """
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


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_bytes(path: Path, data: bytes) -> None:
    """Write ``data``, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: Path, data: Any, indent: int | None = 1) -> None:
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
