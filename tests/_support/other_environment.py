"""Environments with other packages than the running one, and what pytest and git say of a run in them."""

from __future__ import annotations

import json
import os
import platform
import re
import site
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from tests._support import torchvision

ROOT = Path(__file__).resolve().parents[2]


def environment(folder: Path, packages: Sequence[str]) -> Path:
    """The interpreter of a new environment with some packages; the others are shared with this one."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = folder / "bin" / "python"
    own = subprocess.run(
        [str(python), "-c", "import site; print(site.getsitepackages()[0])"], check=True, capture_output=True, text=True
    ).stdout.strip()
    Path(own, "shared.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    if torchvision.FOLDER.is_dir():
        Path(folder, torchvision.FOLDER.name).symlink_to(torchvision.FOLDER)
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*install, *packages], check=True)
    return python


def versions(python: Path, path: str = "") -> dict[str, str]:
    """Versions of the libraries an interpreter sees; ``path`` comes first on its search path."""
    code = (
        "import json, importlib;"
        "print(json.dumps({n: importlib.import_module(n).__version__ for n in "
        "('torch', 'diffusers', 'transformers', 'accelerate')}))"
    )
    env = {**os.environ, "PYTHONPATH": path}
    told = subprocess.run([str(python), "-c", code], check=True, capture_output=True, text=True, env=env)
    return json.loads(told.stdout)


def commit(folder: Path = ROOT) -> str:
    """Commit of a tree, ``unknown`` outside of one."""
    told = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=False)
    return told.stdout.strip() or "unknown"


def write_record(output: Path, command: str, content: dict[str, Any]) -> None:
    """Put ``content``, with hardware, commit and command, into a JSON file, at once."""
    record = {
        "command": command,
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "hardware": {"machine": platform.machine(), "cores": os.cpu_count()},
        "python": platform.python_version(),
        **content,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=2) + "\n")
    temporary.replace(output)


def outcomes(report: Path) -> Iterator[tuple[str, str, str]]:
    """Name, outcome (``passed``, ``failed`` or ``skipped``) and message of every test of a JUnit file."""
    for test in ElementTree.parse(report).iter("testcase"):
        name = f"{test.get('classname')}::{test.get('name')}"
        for tag, outcome in (("failure", "failed"), ("error", "failed"), ("skipped", "skipped")):
            found = test.find(tag)
            if found is not None:
                yield name, outcome, re.sub(r"\s+", " ", found.get("message") or "")[:200]
                break
        else:
            yield name, "passed", ""


def seconds(report: Path) -> float:
    """Seconds of a JUnit file, all of its tests together."""
    return round(sum(float(suite.get("time") or 0) for suite in ElementTree.parse(report).iter("testsuite")), 1)


def read_report(report: Path) -> dict[str, Any]:
    """Counts of a JUnit file, its failed tests with their error, its skip reasons with their number."""
    every = list(outcomes(report))
    counts = Counter(outcome for _, outcome, _ in every)
    return {
        **{key: counts[key] for key in ("passed", "failed", "skipped")},
        "failures": {name: message for name, outcome, message in every if outcome == "failed"},
        "skips": Counter(message for _, outcome, message in every if outcome == "skipped"),
    }
