"""The manifest of a run: one JSON row per pair that was made, accepted or not.

Every process of a run appends to a file of its own; the first one joins them when all are done.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dit_attn import files
from dit_attn.pipelines.worker_share import WorkerShare

MANIFEST = "manifest.jsonl"
_REMEDY = "free some space and go on with --resume"


class Manifest:
    """The rows of a run, those of earlier runs and of other processes among them.

    Args:
        folder: of the run.
        worker: which of several processes this is.

    Attributes:
        rows: what was there at the start; the same in every process.
        path: file of this process.

    Raises:
        DitAttnError: the disk is full.
    """

    def __init__(self, folder: Path, worker: WorkerShare):
        self._folder, self._worker = folder, worker
        self.path = folder / (f"manifest-{worker.rank}.jsonl" if worker.rank else MANIFEST)
        own = read_rows(self.path)
        if self.path.is_file():  # without a row that was cut off, which the next one would be glued to
            write_rows(self.path, own)
        left = [row for file in self._others() if _number(file) >= worker.size for row in read_rows(file)]
        self.rows: list[dict[str, Any]] = worker.gather([*own, *(left if worker.rank == 0 else [])])

    def append(self, row: dict[str, Any]) -> None:
        """Append a row to the file of this process.

        Raises:
            DitAttnError: the disk is full.
        """
        if not self.path.is_file():
            return write_rows(self.path, [row])
        with files.report_os_error(f"write {self.path}", _REMEDY):
            files.append_text(self.path, _line(row))

    def join(self, rows: Sequence[dict[str, Any]]) -> None:
        """Write all rows into one file, in the first process, once all processes have given theirs.

        Raises:
            DitAttnError: the disk is full; the files of the processes stay.
        """
        if self._worker.rank == 0:
            write_rows(self._folder / MANIFEST, rows)
            for file in self._others():
                file.unlink()

    def _others(self) -> list[Path]:
        """Files of processes but the first, of this run or an earlier one."""
        return sorted(file for file in self._folder.glob("manifest-*.jsonl") if _number(file))


def _number(file: Path) -> int:
    number = file.stem.rpartition("-")[2]
    return int(number) if number.isdecimal() else 0


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a manifest; one that was cut off is dropped."""
    rows: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and "decision" in row:
            rows.append(row)
    return rows


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write a manifest anew, atomically.

    Raises:
        DitAttnError: the disk is full.
    """
    with files.report_os_error(f"write {path}", _REMEDY):
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_text(path, "".join(_line(row) for row in rows))


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"
