"""Measurements that survive an interruption: one line of JSON each, written as they come."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dit_attn.errors import DitAttnError, RunStopped


class Store:
    """Measurements, written to a file as they come, so that interrupted work goes on where it was.

    Args:
        path: the file (JSON lines, the first one the set-up); ``None`` keeps them in memory.
        setup: what decides the measurements.
        resume: take over what the file has; otherwise it begins anew, and an old file gets ``.bak`` to its name.
        told: of the key of every measurement that is added.

    Raises:
        DitAttnError: the file is of another set-up, or cannot be read or written.
    """

    def __init__(
        self,
        path: Path | None = None,
        setup: dict[str, Any] | None = None,
        resume: bool = False,
        told: Callable[[str], None] = lambda key: None,
    ) -> None:
        self.path, self.told = path, told
        self.rows: dict[str, Any] = {}
        head = json.loads(json.dumps(setup or {}, default=str))
        if path is None:
            return
        try:
            if not resume and path.is_file():
                os.replace(path, path.with_name(f"{path.name}.bak"))
            lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
            rows = [row for line in lines if (row := _parsed(line)) is not None]
            if rows and rows[0].get("setup") != head:
                raise DitAttnError(
                    f"{path} holds measurements of another model, method, prompts or settings; leave out --resume to "
                    "begin anew, or give another --output"
                )
            whole = [row for row in rows[1:] if isinstance(row.get("key"), str) and "value" in row]
            self.rows = {row["key"]: row["value"] for row in whole}
            kept = [{"setup": head}, *({"key": key, "value": value} for key, value in self.rows.items())]
            temporary = path.with_name(f".partial-{path.name}")  # a cut here loses neither the old file nor the new one
            temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
            os.replace(temporary, path)
        except UnicodeDecodeError as error:
            raise DitAttnError(f"{path} is not text; leave out --resume to begin anew") from error
        except OSError as error:
            raise DitAttnError(f"cannot write {path} ({error.strerror}); choose another --output") from error

    def put(self, key: str, value: Any) -> None:
        """Keep a measurement and write it down."""
        try:
            if self.path is not None:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"key": key, "value": value}) + "\n")
        except OSError as error:
            raise RunStopped(
                f"cannot write {self.path} ({error.strerror}); what is measured is kept: make room, then run the same "
                "command with --resume"
            ) from error
        self.rows[key] = value
        self.told(key)


def _parsed(line: str) -> dict[str, Any] | None:
    """One line of a store; ``None`` for one that was cut off."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return None
    return row if isinstance(row, dict) else None
