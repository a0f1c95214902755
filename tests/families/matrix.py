"""The family tests on the lowest, a middle and the latest supported diffusers: ``make test-matrix``.

Each version gets an environment of its own in a temporary folder. It holds that diffusers and a transformers that fits,
and finds everything else, torch first of all, where the running interpreter finds it. Families that a version lacks are
skipped with the reason; the result is one JSON file.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import site
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from tests._support import torchvision

ROOT = Path(__file__).resolve().parents[2]
# diffusers release -> the transformers it was published against
VERSIONS = {"0.36.0": "transformers>=4.51,<5", "0.38.0": "transformers>=4.51,<5", "0.42.1": "transformers>=5"}


def environment(folder: Path, diffusers: str, transformers: str) -> Path:
    """The interpreter of a new environment with that diffusers; other packages are shared with this one."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = folder / "bin" / "python"
    own = subprocess.run(
        [str(python), "-c", "import site; print(site.getsitepackages()[0])"], check=True, capture_output=True, text=True
    ).stdout.strip()
    Path(own, "shared.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    if torchvision.FOLDER.is_dir():
        Path(folder, torchvision.FOLDER.name).symlink_to(torchvision.FOLDER)
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*install, f"diffusers=={diffusers}", transformers], check=True)
    return python


def run_tests(python: Path, folder: Path, tests: str) -> dict[str, Any]:
    """Counts, failures and reasons of skips of one run of the family tests."""
    report = folder / "report.xml"
    plugins = ["-p", "tests._support.missing_classes", "-p", "no:cacheprovider"]
    command = ["-m", "pytest", *plugins, tests, f"--junitxml={report}"]
    started = time.perf_counter()
    done = subprocess.run([str(python), *command], cwd=ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=False)
    seconds = round(time.perf_counter() - started, 1)
    if not report.exists():
        raise SystemExit(f"pytest ended with {done.returncode} and no report; run {python} {' '.join(command)}")
    return {"versions": versions(python), "seconds": seconds, **read_report(report)}


def read_report(report: Path) -> dict[str, Any]:
    """Outcome of a JUnit file: counts, failed tests with their error, skip reasons with their number."""
    outcome: Counter[str] = Counter()
    failed: dict[str, str] = {}
    skipped: Counter[str] = Counter()
    for test in ElementTree.parse(report).iter("testcase"):
        name = f"{test.get('classname')}::{test.get('name')}"
        problem = next((test.find(tag) for tag in ("failure", "error") if test.find(tag) is not None), None)
        skip = test.find("skipped")
        if problem is not None:
            outcome["failed"] += 1
            failed[name] = re.sub(r"\s+", " ", problem.get("message") or "")[:200]
        elif skip is not None:
            outcome["skipped"] += 1
            skipped[skip.get("message") or ""] += 1
        else:
            outcome["passed"] += 1
    return {**{key: outcome[key] for key in ("passed", "failed", "skipped")}, "failures": failed, "skips": skipped}


def versions(python: Path) -> dict[str, str]:
    """Versions of the libraries an interpreter sees."""
    code = (
        "import json; from importlib.metadata import version;"
        "print(json.dumps({n: version(n) for n in ('torch', 'diffusers', 'transformers', 'accelerate')}))"
    )
    return json.loads(subprocess.run([str(python), "-c", code], check=True, capture_output=True, text=True).stdout)


def commit() -> str:
    """Commit of the tree the tests ran on."""
    told = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return told.stdout.strip() or "unknown"


def write(output: Path, results: dict[str, Any]) -> None:
    """Put what is known so far, with hardware, versions, commit and command, into the JSON file."""
    record = {
        "command": f"python -m tests.families.matrix --versions {' '.join(results)}",
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "hardware": {"machine": platform.machine(), "cores": os.cpu_count()},
        "python": platform.python_version(),
        "results": results,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=2) + "\n")
    temporary.replace(output)


def main() -> int:
    """Run the matrix and write the JSON file; 1 when a test failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/matrix.json"))
    parser.add_argument("--versions", nargs="+", default=list(VERSIONS), choices=list(VERSIONS))
    parser.add_argument("--tests", default="tests/families", help="what to run (default: %(default)s)")
    options = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="matrix-") as scratch:
        for version in options.versions:
            folder = Path(scratch, version)
            results[version] = run_tests(environment(folder, version, VERSIONS[version]), folder, options.tests)
            write(options.output, results)
    for version, result in results.items():
        print(f"diffusers {version}: {result['passed']} passed, {result['failed']} failed, {result['skipped']} skipped")
    return int(any(result["failed"] for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
