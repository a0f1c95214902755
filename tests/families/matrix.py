"""The family tests on the lowest, some middle and the latest supported diffusers: ``make test-matrix``.

Each version gets an environment of its own in a temporary folder. It holds that diffusers and a transformers that fits,
and finds everything else, torch first of all, where the running interpreter finds it. Families that a version lacks are
skipped with the reason; the result is one JSON file, in which rows of versions that were not run now stay.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests._support.other_environment import ROOT, commit, environment, read_report, versions, write_record

# diffusers release -> the transformers it was published against; servers pin 0.37.0 (SGLang) and 0.40.0 (vLLM-Omni)
VERSIONS = {
    "0.36.0": "transformers>=4.51,<5",
    "0.37.0": "transformers>=4.51,<5",
    "0.38.0": "transformers>=4.51,<5",
    "0.40.0": "transformers>=5",
    "0.42.1": "transformers>=5",
}


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
    return {"commit": commit(), "versions": versions(python), "seconds": seconds, **read_report(report)}


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
            python = environment(folder, [f"diffusers=={version}", VERSIONS[version]])
            results[version] = run_tests(python, folder, options.tests)
            kept = json.loads(options.output.read_text())["results"] if options.output.exists() else {}
            command = f"python -m tests.families.matrix --versions {' '.join(results)}"
            write_record(options.output, command, {"results": dict(sorted({**kept, **results}.items()))})
    for version, result in results.items():
        print(f"diffusers {version}: {result['passed']} passed, {result['failed']} failed, {result['skipped']} skipped")
    return int(any(result["failed"] for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
