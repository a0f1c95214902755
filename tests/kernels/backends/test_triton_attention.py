"""The Triton attention kernels without a GPU: every case runs in Triton's interpreter, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")


def test_the_kernels_agree_with_the_formulas() -> None:
    folder = "tests/kernels/interpreted"
    cases = [f"{folder}/attention_cases.py", f"{folder}/linear_cases.py", f"{folder}/stats_cases.py"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-n", "2", *cases],
        env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout and "skipped" not in run.stdout
