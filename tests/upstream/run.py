"""Diffusers' own tests with a method on every transformer: ``make test-upstream DIFFUSERS=path``.

Runs tests of a diffusers checkout as they are, then once with each method of the plug-in in the folder ``plugin``, and
lists the tests that end differently. The checkout is a work tree of a supported version; its own sources are tested.
Packages that its tests need, and this project does not, come into an environment of their own in a temporary folder.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from tests._support.other_environment import ROOT, commit, environment, outcomes, seconds, versions, write_record

PLUGIN = Path(__file__).parent / "plugin"
ARMS = ("pass-through", "block-sparse", "rectified-spaattn", "re-ttention", "softpag")
REFUSAL = "dit_attn.errors.DitAttnError: "
PACKAGES = ("httpx", "parameterized", "requests", "requests-mock", "sentencepiece")


def run_arm(python: Path, checkout: Path, reports: Path, arm: str, given: list[str]) -> dict[str, Any]:
    """Outcome and message of every test, and what the plug-in counted; ``arm`` is ``"stock"`` for neither.

    An arm whose report lies in ``reports`` is read from there and not run again.
    """
    report, counts, made_at = (reports / f"{arm}.{ending}" for ending in ("xml", "json", "commit"))
    if not report.exists():
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": search_path(checkout), "DIT_ATTN_COUNTS": str(counts)}
        if arm != "stock":
            env["DIT_ATTN_METHOD"] = arm
        command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "dit_attn_upstream"]
        done = subprocess.run([*command, *given, f"--junitxml={report}"], cwd=checkout, env=env, check=False)
        if not report.exists():
            raise SystemExit(f"pytest ended with {done.returncode} and no report on {arm}; see above")
        made_at.write_text(commit())
    return {
        "commit": made_at.read_text().strip() if made_at.exists() else "unknown",
        "seconds": seconds(report),
        "tests": {name: (outcome, message) for name, outcome, message in outcomes(report)},
        "counts": json.loads(counts.read_text()) if counts.exists() else {},
    }


def search_path(checkout: Path) -> str:
    """Where the plug-in, the sources of the checkout and this package are found, in this order."""
    return os.pathsep.join(map(str, (PLUGIN, checkout / "src", ROOT)))


def compare(stock: dict[str, Any], arm: dict[str, Any]) -> dict[str, Any]:
    """The tests that end differently, with both outcomes and the message.

    Those that fail with the line in which this package refuses something are counted by the line instead.
    """
    tests: dict[str, Any] = arm["tests"]
    changed = {
        name: (before, *tests.get(name, ("missing", "")))
        for name, (before, _) in stock["tests"].items()
        if tests.get(name, ("missing",))[0] != before
    }
    refused = Counter(why.removeprefix(REFUSAL) for _, _, why in changed.values() if why.startswith(REFUSAL))
    differs = {
        name: f"{before} -> {after}: {why}".removesuffix(": ")
        for name, (before, after, why) in changed.items()
        if not why.startswith(REFUSAL)
    }
    return {**totals(arm), "counts": arm["counts"], "refused": dict(refused), "differs": differs}


def totals(arm: dict[str, Any]) -> dict[str, Any]:
    """Number of tests by outcome, seconds, and the commit that ran them."""
    every = [outcome for outcome, _ in arm["tests"].values()]
    counts = {key: every.count(key) for key in ("passed", "failed", "skipped")}
    return {**counts, "seconds": arm["seconds"], "commit": arm["commit"]}


def main() -> int:
    """Run the arms and write the JSON file; 1 where a test ends differently."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("diffusers", type=Path, help="work tree of diffusers")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/upstream.json"))
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--tests", nargs="+", default=["tests/models/transformers", "tests/pipelines"])
    parser.add_argument("--reports", type=Path, help="keep the reports here; a later call runs only the arms it lacks")
    parser.add_argument("--pytest", nargs=argparse.REMAINDER, default=[], help="what follows is given to pytest")
    options = parser.parse_args()
    checkout = options.diffusers.expanduser().resolve()
    if not (checkout / "src" / "diffusers").is_dir():
        parser.error(f"{checkout} is no work tree of diffusers: it has no src/diffusers; clone it and give its folder")
    given = [*options.tests, *options.pytest]
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="upstream-") as folder:
        reports = Path(folder) if options.reports is None else options.reports.expanduser().resolve()
        reports.mkdir(parents=True, exist_ok=True)
        python = environment(Path(folder) / "environment", PACKAGES)
        stock = run_arm(python, checkout, reports, "stock", given)
        for arm in options.arms:
            results[arm] = compare(stock, run_arm(python, checkout, reports, arm, given))
            write_record(
                options.output,
                f"make test-upstream DIFFUSERS=path (arms: {' '.join(results)}; tests: {' '.join(given)})",
                {
                    "versions": versions(python, search_path(checkout)),
                    "diffusers commit": commit(checkout),
                    "stock": totals(stock),
                    "results": results,
                },
            )
    for arm, result in results.items():
        print(f"{arm}: {result['passed']} passed, {len(result['differs'])} differ from the run without a method")
        for why, count in result["refused"].items():
            print(f"  {count} refused: {why}")
        for name, change in result["differs"].items():
            print(f"  {name}: {change}")
    return int(any(result["differs"] for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
