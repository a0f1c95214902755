"""What this machine is called in records and tables, the memory it has left, and whether it multiplies in bf16."""

from __future__ import annotations

import os
import platform
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def processor_model() -> str:
    """Return the processor's model name, e.g. ``"AMD EPYC"``; its architecture where the system does not tell."""
    return _kernel_fact("cpuinfo", "model name") or platform.machine()


@cache
def processor() -> str:
    """Return the processor's model name and its number of cores, e.g. ``"AMD EPYC, 2 cores"``."""
    return f"{processor_model()}, {os.cpu_count()} cores"


def free_memory(device: torch.device) -> int | None:
    """Measure the free bytes of a device, ``None`` where unknown; on a CPU what the system caches counts as free."""
    if device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    found = _kernel_fact("meminfo", "MemAvailable")
    return main_memory() if found is None else 1024 * int(found.split()[0])


def main_memory() -> int | None:
    """Return the bytes of main memory, ``None`` where the system does not tell."""
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _kernel_fact(table: str, key: str) -> str | None:
    """The first value of a key in a table of Linux under /proc; ``None`` elsewhere."""
    path = Path("/proc", table)
    lines = path.read_text().splitlines() if path.is_file() else []
    pairs = (line.split(":", 1) for line in lines if ":" in line)
    return next((value.strip() for name, value in pairs if name.strip() == key), None)


@lru_cache(maxsize=4)
def multiplies_bf16(device: torch.device) -> bool:
    """Return whether a device multiplies matrices in bf16 about as fast as in fp32; a CPU without AVX-512 does not."""
    import torch

    if device.type != "cpu":
        return True
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
