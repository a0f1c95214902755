"""Timing: competitors run in turns, and a GPU is timed by Triton's benchmark, here replaced by a recorder."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from dit_attn.kernels.benchmark import timing

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_calls_take_turns_and_the_first_round_is_discarded() -> None:
    order: list[str] = []
    times = timing.interleaved([lambda: order.append("a"), lambda: order.append("b")], 3, CPU, timing.kernel_timed)
    assert order == ["a", "b"] * 4
    assert [len(found) for found in times] == [3, 3] and all(ms >= 0.0 for found in times for ms in found)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The options ``do_bench`` is called with; it returns how often it was called."""
    testing = pytest.importorskip("triton.testing")
    given: list[dict[str, Any]] = []

    def do_bench(call: timing.Call, **options: Any) -> int:
        call()
        given.append(options)
        return len(given)

    monkeypatch.setattr(testing, "do_bench", do_bench)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    return given


def test_a_gpu_is_timed_by_do_bench_in_turns_without_a_round_to_discard(bench: list[dict[str, Any]]) -> None:
    order: list[str] = []
    calls = [lambda: order.append("a"), lambda: order.append("b")]
    assert timing.interleaved(calls, 2, CUDA, timing.kernel_timed) == [[1.0, 3.0], [2.0, 4.0]]
    assert order == ["a", "b"] * 2
    assert all(options["return_mode"] == "min" and options["rep"] > 0 for options in bench)


def test_a_gpu_without_triton_and_a_cpu_are_timed_by_the_clock(
    monkeypatch: pytest.MonkeyPatch, bench: list[dict[str, Any]]
) -> None:
    monkeypatch.setattr(timing, "has_triton", lambda: False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    assert timing.kernel_timed(lambda: None, CUDA) >= 0.0 and timing.kernel_timed(lambda: None, CPU) >= 0.0
    assert bench == []


def test_the_host_time_of_a_cpu_is_not_a_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    assert timing.host_time(lambda: None, CPU) is None
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    host = timing.host_time(lambda: None, CUDA)
    assert host is not None and 0.0 <= host < 1000.0
