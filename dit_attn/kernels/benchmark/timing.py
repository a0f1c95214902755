"""Timing of calls: by the wall clock, by ``triton.testing.do_bench`` on a GPU, and interleaved in rounds."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from dit_attn.kernels.device import has_triton

Call = Callable[[], Any]
Timer = Callable[[Call, torch.device], float]
WARMUP_MS = 5
"""Milliseconds for which ``do_bench`` runs a call before it measures; at least one call."""
MEASURED_MS = 10
"""Milliseconds for which it measures; at least one call."""


def timed(call: Call, device: torch.device) -> float:
    """Return the wall-clock milliseconds of one call, from an idle device to an idle device."""
    synchronize(device)
    started = time.perf_counter()
    call()
    synchronize(device)
    return 1e3 * (time.perf_counter() - started)


def kernel_timed(call: Call, device: torch.device) -> float:
    """Return the milliseconds of one call, on a GPU by ``triton.testing.do_bench``, elsewhere by :func:`timed`.

    ``do_bench`` overwrites the L2 cache before every call and queues calls without waiting for them, so the time the
    host needs to launch kernels is hidden unless it exceeds that of the kernels (:func:`host_time`). The result is the
    shortest of its calls. It runs a call eight times at least.
    """
    if not _uses_do_bench(device):
        return timed(call, device)
    from triton.testing import do_bench

    with torch.cuda.device(device):
        return float(do_bench(call, warmup=WARMUP_MS, rep=MEASURED_MS, return_mode="min"))


def host_time(call: Call, device: torch.device, repeats: int = 5) -> float | None:
    """Return the milliseconds the host takes to launch one call on a GPU, the shortest of a few; ``None`` on a CPU."""
    times = []
    if device.type != "cuda":
        return None
    for _ in range(repeats):
        synchronize(device)
        started = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - started))
    return min(times)


def interleaved(calls: Sequence[Call], repeats: int, device: torch.device, timer: Timer = timed) -> list[list[float]]:
    """Time all calls in turns, so that drifts of clocks and load affect each of them alike.

    Args:
        calls: the competitors.
        repeats: rounds; every round times every call once.
        device: where they run.
        timer: :func:`timed` or :func:`kernel_timed`.

    Returns:
        Milliseconds of every call in every round. A first round is discarded, except where ``do_bench`` warms up.
    """
    times: list[list[float]] = [[] for _ in calls]
    discarded = 0 if timer is kernel_timed and _uses_do_bench(device) else 1
    for round_number in range(repeats + discarded):
        for i, call in enumerate(calls):
            milliseconds = timer(call, device)
            if round_number >= discarded:
                times[i].append(milliseconds)
    return times


def synchronize(device: torch.device) -> None:
    """Wait until a GPU is idle; nothing to wait for on other devices."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _uses_do_bench(device: torch.device) -> bool:
    return device.type == "cuda" and has_triton()
