"""Log measurements to a JSON-lines file, so that an interrupted job resumes where it stopped."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dit_attn import files
from dit_attn.errors import DitAttnError, RunStopped, reason
from dit_attn.pipelines.run import Shard


class MeasurementLog:
    """Measurements by key, appended to a file one by one. One process at a time has the file.

    Args:
        path: JSON-lines file; its first line is the setup. ``None`` keeps the measurements in memory.
        setup: everything the measurements depend on; a file with another setup is refused.
        resume: read the measurements of the file. Otherwise the file is started anew and an old one gets the
            extension ``.bak``.
        on_result: called with the key of every new measurement.

    Attributes:
        rows: value of every measurement by key, JSON values. A line of the file that was cut off or edited is left
            out: it is measured again.

    Raises:
        DitAttnError: the file has another setup, is a link, is in use by another process, or cannot be read or written.
    """

    def __init__(
        self,
        path: Path | None = None,
        setup: dict[str, Any] | None = None,
        resume: bool = False,
        on_result: Callable[[str], None] = lambda key: None,
    ) -> None:
        self.path, self.on_result = path, on_result
        self.rows: dict[str, Any] = {}
        head = json.loads(json.dumps(setup or {}, default=str))
        if path is None:
            return
        try:
            files.claim(self, path.parent, path.name, "measuring")
            if not resume and (path.is_file() or path.is_symlink()):
                os.replace(path, path.with_name(f"{path.name}.bak"))
            lines = files.read_regular(path).decode("utf-8").splitlines() if os.path.lexists(path) else []
            rows = [row for line in lines if (row := _parse_line(line)) is not None]
            if rows and rows[0].get("setup") != head:
                raise DitAttnError(
                    f"{path} holds measurements of another model, method, prompts or settings; leave out --resume to "
                    "begin anew, or give another --output"
                )
            self.rows = {row["key"]: row["value"] for row in rows[1:] if _is_intact(row)}
            entries = [{"setup": head}, *(_entry(key, value) for key, value in self.rows.items())]
            files.write_text(path, "".join(json.dumps(entry) + "\n" for entry in entries))
        except UnicodeDecodeError as error:
            raise DitAttnError(f"{path} is not text; leave out --resume to begin anew") from error
        except OSError as error:
            raise DitAttnError(f"cannot write {path} ({reason(error)}); choose another --output") from error

    def add(self, key: str, value: Any) -> None:
        """Append a measurement to the file and to :attr:`rows`.

        Args:
            key: unique name of the measurement.
            value: JSON value.

        Raises:
            RunStopped: the file cannot be written.
        """
        try:
            if self.path is not None:
                files.append_text(self.path, json.dumps(_entry(key, value)) + "\n")
        except OSError as error:
            raise RunStopped(
                f"cannot write {self.path} ({reason(error)}); finished measurements are saved: mend that, then run "
                "the same command with --resume"
            ) from error
        self.rows[key] = value
        self.on_result(key)


def shard_log(output: Path, setup: dict[str, Any], resume: bool, shard: Shard | None) -> MeasurementLog:
    """Open the log next to a record; without a shard and with ``resume`` it has the measurements of all shards' logs.

    Args:
        output: the record; its folder is made.
        setup, resume: as of :class:`MeasurementLog`.
        shard: the part that this process measures, with a log of its own.

    Raises:
        DitAttnError: a log has another setup, is in use by another process, or cannot be read or written.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    path = output.with_suffix(".jsonl")
    log = MeasurementLog(path.with_name(shard.file(path.name)) if shard else path, setup, resume)
    if resume and shard is None:
        for other in sorted(path.parent.glob(f"{path.stem}-*-of-*{path.suffix}")):
            log.rows |= MeasurementLog(other, setup, resume=True).rows
    return log


def _entry(key: str, value: Any) -> dict[str, Any]:
    """One measurement as it stands in the file, with a checksum."""
    return {"key": key, "value": value, "crc": zlib.crc32(json.dumps([key, value]).encode())}


def _is_intact(row: dict[str, Any]) -> bool:
    """Whether an entry is as it was written."""
    return isinstance(row.get("key"), str) and "value" in row and row == _entry(row["key"], row["value"])


def _parse_line(line: str) -> dict[str, Any] | None:
    """One entry of a log; ``None`` for a line that was cut off."""
    try:
        row = files.parse_json(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None
