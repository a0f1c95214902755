"""Working memory of the gather backend: buffers that are reused from chunk to chunk, and from call to call."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Workspace:
    """Named buffers that grow to the largest chunk and are reused by the next one."""

    def __init__(self) -> None:
        self.flat: dict[tuple[str, torch.dtype, torch.device], torch.Tensor] = {}

    def get(self, name: str, dtype: torch.dtype, device: torch.device, *shape: int) -> torch.Tensor:
        """Return an uninitialized tensor; the same memory for the same name, dtype and device."""
        size, key = math.prod(shape), (name, dtype, device)
        buffer = self.flat.get(key)
        if buffer is None or buffer.numel() < size:
            with torch.inference_mode(False):  # a later call outside of it must be able to write here
                buffer = self.flat[key] = torch.empty(size, dtype=dtype, device=device)
        return buffer[:size].view(shape)

    def trim(self, limit: int) -> None:
        """Free the largest host buffers until ``limit`` bytes remain, and all buffers of other devices."""
        total = 0
        for key, buffer in sorted(self.flat.items(), key=lambda item: item[1].nbytes):
            total += buffer.nbytes
            if key[2].type != "cpu" or total > limit:
                del self.flat[key]


_THREAD = threading.local()
CACHED_BYTES = 16 << 20  # page faults of fresh memory cost more than the copy into it


@contextmanager
def borrow_workspace() -> Iterator[Workspace]:
    """Provide the working memory of one call; up to ``CACHED_BYTES`` stay with the host thread for the next call."""
    workspace = getattr(_THREAD, "workspace", None) or Workspace()
    _THREAD.workspace = None  # a nested call allocates its own
    try:
        yield workspace
    finally:
        workspace.trim(CACHED_BYTES)
        _THREAD.workspace = workspace
