"""The manifest of a run: one JSON row per pair that was made, accepted or not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dit_attn import files

MANIFEST = "manifest.jsonl"


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


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Append a row to a manifest.

    Raises:
        DitAttnError: the disk is full.
    """
    with files.report_os_error(f"write {path}", "free some space and go on with --resume"):
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(row, ensure_ascii=False) + "\n"
        if path.is_file():
            files.append_text(path, text)
        else:
            files.write_text(path, text)
