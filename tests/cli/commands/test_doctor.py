"""`dit-attn doctor`."""

from __future__ import annotations

import json

import pytest

from dit_attn.cli.commands import doctor


def test_doctor_finds_every_kernel_right_or_says_why_not(cli):
    outcome = cli("doctor", "--json")
    assert outcome.code == 0, outcome.err
    data = json.loads(outcome.out)
    on_cpu = {check["backend"]: check for check in data["kernels"] if check["device"] == "cpu"}
    assert on_cpu["gather"]["status"] == on_cpu["reference"]["status"] == "ok"
    assert all(check["status"] == "ok" or check["why"] for check in data["kernels"])
    assert data["versions"]["torch"] and data["devices"][0]["device"] == "cpu"
    assert all(row["version"] or row["install"] for row in data["optional"])
    assert data["devices"][0]["bf16"] in ("fast", "slow, use float32")
    text = cli("doctor").out
    assert f"threads, bf16 is {data['devices'][0]['bf16']}" in text
    assert "Kernels" in text and text.splitlines()[-1] == data["ready"] and data["ready"].startswith("Ready: ")


@pytest.mark.parametrize(
    ("devices", "kernels", "line"),
    [
        ([{"device": "cuda", "why": "torch is built without CUDA"}], [], "Ready: CPU only; install a torch with CUDA"),
        ([{"device": "cuda", "why": "no NVIDIA driver or GPU found"}], [], "Ready: CPU only; no NVIDIA driver"),
        ([{"device": "cuda:0", "name": "H100"}], [("triton", "ok")], "Ready: cuda:0 (H100), with the Triton kernels."),
        ([{"device": "cuda:0", "name": "H100"}], [("triton", "unavailable")], "without the Triton kernels: no triton."),
        ([], [("gather", "wrong")], "Not ready: gather gives wrong numbers; report it."),
    ],
)
def test_the_last_line_says_what_the_machine_is_ready_for(devices, kernels, line):
    checks = [{"backend": name, "device": "cuda", "status": status, "why": "no triton"} for name, status in kernels]
    assert line in doctor.readiness({"versions": {"torch": "2"}, "devices": devices, "kernels": checks})


def test_a_missing_library_is_no_ready_machine():
    data = {"versions": {"rich": None}, "devices": [], "kernels": []}
    assert doctor.readiness(data) == "Not ready: rich is missing; reinstall dit-attn."


def test_doctor_catches_a_kernel_that_gives_wrong_numbers(cli, monkeypatch):
    from dit_attn import kernels

    original = kernels.sparse_attention

    def wrong(q, k, v, layout, **kwargs):
        return original(q, k, v, layout, **kwargs) + 0.01 * (kwargs["backend"] == "gather")

    monkeypatch.setattr(kernels, "sparse_attention", wrong)
    outcome = cli("doctor", "--json")
    assert outcome.code == 1
    statuses = {check["backend"]: check["status"] for check in json.loads(outcome.out)["kernels"]}
    assert statuses["gather"] == "wrong" and statuses["reference"] == "ok"


def test_doctor_reports_a_kernel_that_breaks_and_keeps_to_its_time(monkeypatch):
    from dit_attn import kernels

    def broken(*args, **kwargs):
        raise RuntimeError("no compiler\nmore")

    monkeypatch.setattr(kernels, "sparse_attention", broken)
    checks = doctor.check_kernels()
    assert {check.status for check in checks} == {"unavailable"}
    assert checks[0].why == "RuntimeError: no compiler"
    assert {check.status for check in doctor.check_kernels(budget=-1.0)} == {"skipped"}
