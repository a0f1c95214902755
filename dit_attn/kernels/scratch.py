"""Working memory of the gather path: buffers that serve one chunk after another, and stay for the next call."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Scratch:
    """Buffers that grow to the largest chunk and are used again by the next one."""

    def __init__(self) -> None:
        self.flat: dict[tuple[str, torch.dtype, torch.device], torch.Tensor] = {}

    def get(self, name: str, dtype: torch.dtype, device: torch.device, *shape: int) -> torch.Tensor:
        """An uninitialised tensor; the same memory for the same name and type."""
        size, key = math.prod(shape), (name, dtype, device)
        held = self.flat.get(key)
        if held is None or held.numel() < size:
            with torch.inference_mode(False):  # a later call outside of it must be able to write here
                held = self.flat[key] = torch.empty(size, dtype=dtype, device=device)
        return held[:size].view(shape)

    def trim(self, limit: int) -> None:
        """Let go of the largest host buffers until ``limit`` bytes are left, and of every other device's."""
        kept = 0
        for key, held in sorted(self.flat.items(), key=lambda item: item[1].nbytes):
            kept += held.nbytes
            if key[2].type != "cpu" or kept > limit:
                del self.flat[key]


_THREAD = threading.local()
KEPT_BYTES = 16 << 20  # fresh memory arrives page by page, which costs more than the copy into it


@contextmanager
def scratch_memory() -> Iterator[Scratch]:
    """Working memory of one call; up to ``KEPT_BYTES`` of it stay with the host thread for the next call."""
    scratch = getattr(_THREAD, "scratch", None) or Scratch()
    _THREAD.scratch = None  # a call within this one makes its own
    try:
        yield scratch
    finally:
        scratch.trim(KEPT_BYTES)
        _THREAD.scratch = scratch
