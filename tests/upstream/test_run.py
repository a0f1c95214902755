"""The upstream runner lists the tests that end differently; its plug-in enables a method on what a test builds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests._support.other_environment import ROOT, outcomes
from tests.upstream import run

TESTS = """
import torch
import dit_attn
from diffusers import WanTransformer3DModel


def made():
    return WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=8,
        freq_dim=16, ffn_dim=16, num_layers=1,
    )


def test_the_same_either_way():
    assert made().config.num_layers == 1


def test_a_stock_processor():
    assert type(made().blocks[0].attn1.processor).__name__ == "WanAttnProcessor"


def test_one_call():
    model = made().eval()
    with torch.no_grad():
        model(torch.randn(1, 4, 2, 8, 8), torch.tensor([5]), torch.randn(1, 3, 8))
    assert True
"""


def test_the_plug_in_enables_the_method_on_every_model_a_test_builds(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "test_made.py").write_text(TESTS)
    python, given = Path(sys.executable), [str(tmp_path / "test_made.py")]
    stock = run.run_arm(python, tmp_path, tmp_path, "stock", given)
    assert set(dict(stock["tests"].values())) == {"passed"} and stock["counts"] == {}
    found = run.compare(stock, run.run_arm(python, tmp_path, tmp_path, "block-sparse", given))
    assert found["counts"] == {"models": 3, "calls carried out": 1}
    (name, change), *rest = found["differs"].items()
    assert name.endswith("test_a_stock_processor") and change.startswith("passed -> failed: ") and not rest
    assert (found["passed"], found["failed"], found["skipped"]) == (2, 1, 0) and found["seconds"] > 0


def test_an_arm_whose_report_is_there_is_not_run_again(tmp_path: Path) -> None:
    report = '<testsuites><testsuite time="2.5"><testcase classname="m" name="a"/></testsuite></testsuites>'
    (tmp_path / "stock.xml").write_text(report)
    (tmp_path / "stock.commit").write_text("abc")
    arm = run.run_arm(Path("no interpreter"), tmp_path, tmp_path, "stock", [])
    assert arm == {"commit": "abc", "seconds": 2.5, "tests": {"m::a": ("passed", "")}, "counts": {}}


def test_a_test_that_is_missing_or_skipped_differs() -> None:
    stock = {"tests": {"a": ("passed", ""), "b": ("passed", ""), "c": ("failed", "x")}}
    arm = {"tests": {"a": ("skipped", "why"), "c": ("failed", "y")}, "seconds": 1.0, "commit": "", "counts": {}}
    assert run.compare(stock, arm)["differs"] == {"a": "passed -> skipped: why", "b": "passed -> missing"}


def test_what_the_package_refuses_in_a_line_is_counted_by_the_line() -> None:
    stock = {"tests": dict.fromkeys("abc", ("passed", ""))}
    line = "dit_attn.errors.DitAttnError: cannot be trained; disable it"
    arm = {
        "tests": {"a": ("failed", line), "b": ("failed", line), "c": ("failed", "assert 1")},
        "seconds": 1.0,
        "commit": "",
        "counts": {},
    }
    found = run.compare(stock, arm)
    assert found["refused"] == {"cannot be trained; disable it": 2}
    assert found["differs"] == {"c": "passed -> failed: assert 1"}


def test_a_folder_that_is_no_work_tree_is_refused(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.upstream.run", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and "it has no src/diffusers; clone it and give its folder" in done.stderr


def test_every_method_of_the_runner_is_one_of_the_plug_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(run.PLUGIN))
    import dit_attn_upstream  # type: ignore[import-not-found]

    assert tuple(dit_attn_upstream.METHODS) == run.ARMS


def test_outcomes_are_read_from_a_junit_file(tmp_path: Path) -> None:
    report = tmp_path / "r.xml"
    report.write_text(
        '<testsuites><testsuite><testcase classname="m" name="a"/>'
        '<testcase classname="m" name="b"><failure message="no\n good"/></testcase>'
        '<testcase classname="m" name="c"><skipped message="later"/></testcase></testsuite></testsuites>'
    )
    assert json.dumps(list(outcomes(report))) == json.dumps(
        [["m::a", "passed", ""], ["m::b", "failed", "no good"], ["m::c", "skipped", "later"]]
    )
