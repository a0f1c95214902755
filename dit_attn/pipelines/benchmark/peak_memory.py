"""Measure the peak memory of a computation, on a GPU or of the process."""

from __future__ import annotations

import functools
from pathlib import Path

import torch

_RESET = Path("/proc/self/clear_refs")  # Linux: "5" resets the peak to the resident size of now
_STATUS = Path("/proc/self/status")


def reset(device: torch.device) -> None:
    """Reset the peak memory, where the machine allows it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif _resettable():
        _RESET.write_text("5")


def read(device: torch.device) -> int | None:
    """Return the peak memory in bytes since :func:`reset`; ``None`` where it cannot be measured."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type != "cpu" or not _resettable():
        return None
    lines = _STATUS.read_text().splitlines()
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), None)


def label(device: torch.device) -> str:
    """Return what the peak memory of this device includes, in words."""
    if device.type == "cuda":
        return "peak of torch's allocations on the GPU during the step, weights included"
    if device.type == "cpu" and _resettable():
        return "peak resident memory of the process during the step: libraries, weights and cached heap included"
    return "not measured: this machine does not report it"


@functools.cache
def _resettable() -> bool:
    try:
        _RESET.write_text("5")
    except OSError:
        return False
    return True
