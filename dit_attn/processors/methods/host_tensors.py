"""Tensors in main memory that come back to the device ahead of their use.

Layers ask for their tensors in the order in which they were stored. While a layer computes with its own, those of the
next one are on their way: on CUDA from pinned memory, on a stream of their own. At most two layers' tensors are on the
device at a time. On other devices they come when they are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Protocol

import torch

_CHUNK = 1 << 26  # bytes of a pinned allocation, whose size is rounded up to a power of two


class Mover(Protocol):
    """Copies tensors of one device to main memory and back."""

    def store(self, x: torch.Tensor) -> Any:
        """Begin to copy a tensor to main memory; return what :meth:`begin` takes."""

    def begin(self, stored: Any) -> Callable[[], torch.Tensor]:
        """Begin to copy a tensor back; return a function that waits for it."""


class PlainMover:
    """Copies when asked.

    Args:
        device: that the tensors come from and go back to.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def store(self, x: torch.Tensor) -> torch.Tensor:
        """Copy a tensor to main memory."""
        return x.cpu()

    def begin(self, stored: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Return a function that copies a tensor back."""
        return lambda: stored.to(self.device)


class PinnedMover:
    """Copies on a stream of its own, to and from pinned memory.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)

    def store(self, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Begin to copy a tensor to main memory: an empty one that says its form, and its bytes in pieces."""
        x = x.contiguous()
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            pieces = [_pinned(piece).copy_(piece, non_blocking=True) for piece in _bytes_of(x).split(_CHUNK)]
        x.record_stream(self.stream)
        return torch.empty_like(x, device="meta"), pieces

    def begin(self, stored: tuple[torch.Tensor, list[torch.Tensor]]) -> Callable[[], torch.Tensor]:
        """Begin to copy a tensor back, after all that this stream was given before."""
        form, pieces = stored
        with torch.cuda.stream(self.stream):
            out = torch.empty_like(form, device=self.device)
            for there, here in zip(_bytes_of(out).split(_CHUNK), pieces, strict=True):
                there.copy_(here, non_blocking=True)
            arrived = self.stream.record_event()

        def wait() -> torch.Tensor:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(arrived)
            out.record_stream(current)
            return out

        return wait


@lru_cache(maxsize=64)
def mover_for(device: torch.device) -> Mover:
    """Return what copies to and from a device."""
    return PinnedMover(device) if device.type == "cuda" else PlainMover(device)


class HostTensors:
    """Tensors of one layer in main memory.

    Args:
        tensors: on the device to which they will come back.

    Attributes:
        following: those that will be asked for next, ``None`` where nobody said.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._mover = mover_for(tensors[0].device)
        self._stored = [self._mover.store(x) for x in tensors]
        self._arriving: list[Callable[[], torch.Tensor]] | None = None
        self.following: HostTensors | None = None

    def begin(self) -> None:
        """Let the tensors come; once they do, nothing is begun again."""
        if self._arriving is None:
            self._arriving = [self._mover.begin(x) for x in self._stored]

    def take(self) -> tuple[torch.Tensor, ...]:
        """Return the tensors on the device, and let those that follow come."""
        self.begin()
        arriving, self._arriving = self._arriving or [], None
        if self.following is not None:
            self.following.begin()
        return tuple(wait() for wait in arriving)


def _bytes_of(x: torch.Tensor) -> torch.Tensor:
    return x.view(-1).view(torch.uint8)


def _pinned(like: torch.Tensor) -> torch.Tensor:
    """An empty tensor in pinned memory, or in plain main memory where no more can be pinned."""
    try:
        return torch.empty(like.shape, dtype=like.dtype, pin_memory=True)
    except RuntimeError:
        return torch.empty(like.shape, dtype=like.dtype)
