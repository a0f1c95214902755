"""The cost tables that a user has measured: one JSON file for all machines that share the cache folder."""

from __future__ import annotations

import functools
import os
import warnings
from pathlib import Path

from dit_attn import files
from dit_attn.errors import reason
from dit_attn.kernels.cost.table import CostTable, Machine

FORMAT = 2
"""Number of the file's format; files with another one are not read."""
VARIABLE = "DIT_ATTN_COSTS"
"""Environment variable with the path of the file."""
REMEDY = "dit-attn bench kernels --save"


def costs_path() -> Path:
    """Return the file: what ``DIT_ATTN_COSTS`` says, else ``dit_attn/costs.json`` in the user's cache folder.

    Raises:
        DitAttnError: the variable is no path.
    """
    given = os.environ.get(VARIABLE)
    if given:
        return files.user_path(given, VARIABLE)
    return files.cache_folder() / "costs.json"


def saved_table(machine: Machine) -> tuple[CostTable | None, str]:
    """Return the table that was measured on a machine, and why there is none.

    A file that cannot be used is warned of, once for each of its contents.

    Args:
        machine: all of its fields have to agree.
    """
    path = costs_path()
    try:
        stamp = path.stat()
    except FileNotFoundError:
        return None, f"run {REMEDY} to measure it"
    except OSError as error:
        return None, f"{path} cannot be read ({reason(error)})"
    tables, problem = _read(path, stamp.st_mtime_ns, stamp.st_size, stamp.st_ino)
    found = next((table for table in tables if table.machine == machine), None)
    return found, "" if found else problem or f"measured with other threads or versions; run {REMEDY} again"


def save_table(table: CostTable) -> Path:
    """Put a table into the file, in place of an older one of the same machine; processes wait for each other.

    Returns:
        The file.

    Raises:
        DitAttnError: the file cannot be written; an old one is unchanged then.
    """
    path = costs_path()
    with files.report_os_error(f"save the costs to {path}", f"set {VARIABLE} to a file that can be written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.locked(path.parent, path.name):
            others = [old for old in _tables(path) if old.machine != table.machine] if path.exists() else []
            files.write_json(path, {"format": FORMAT, "tables": [each.to_dict() for each in (*others, table)]})
    return path


@functools.lru_cache(maxsize=8)
def _read(path: Path, *stamp: int) -> tuple[tuple[CostTable, ...], str]:
    """The tables of a file, and why there are none; read again when its stamp changes."""
    try:
        return _parse(path.read_bytes()), ""
    except (OSError, ValueError) as error:
        problem = f"{path} is not used ({reason(error)}); run {REMEDY} again"
        warnings.warn(f"dit_attn: {problem}", stacklevel=2)
        return (), problem


def _tables(path: Path) -> tuple[CostTable, ...]:
    """The tables to keep when a new one is saved; none of a file that is not ours."""
    try:
        return _parse(path.read_bytes())
    except ValueError:
        return ()


def _parse(text: bytes) -> tuple[CostTable, ...]:
    """Read the text of a file. Raises ``ValueError`` where it is none."""
    data = files.parse_json(text)
    if not isinstance(data, dict) or not isinstance(data.get("tables"), list):
        raise ValueError("it holds no cost tables")
    if data.get("format") != FORMAT:
        raise ValueError(f"its format is {data.get('format')!r}, this version reads {FORMAT}")
    return tuple(CostTable.from_dict(table) for table in data["tables"])
