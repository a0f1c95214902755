"""What this machine is called in records and tables, the memory it has left, and whether it multiplies in bf16."""

from __future__ import annotations

import os
import platform
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def processor() -> str:
    """Return the processor's model name and its number of cores, e.g. ``"AMD EPYC, 2 cores"``."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{model}, {os.cpu_count()} cores"


def free_memory(device: torch.device) -> int | None:
    """Measure the free bytes of a device, ``None`` where unknown; on a CPU what the system caches counts as free."""
    if device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    table = Path("/proc/meminfo")
    lines = table.read_text().splitlines() if table.is_file() else []
    found = next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), None)
    if found is None and hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return found


@lru_cache(maxsize=4)
def multiplies_bf16(device: torch.device) -> bool:
    """Return whether a device multiplies matrices in bf16 about as fast as in fp32; a CPU without AVX-512 does not."""
    import torch

    if device.type != "cpu":
        return True
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
