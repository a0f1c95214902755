"""Numbers of a device that are read at a later step, so that no step waits for the work it has just queued."""

from __future__ import annotations

import torch


class LaterNumbers:
    """The copy of a tensor to the host, made behind the work that is queued already.

    Args:
        values: any shape.
    """

    def __init__(self, values: torch.Tensor) -> None:
        self._event = None
        if values.device.type == "cuda":
            values = values.to("cpu", non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        self._values = values

    def read(self) -> list[float]:
        """Return the numbers, flattened; waits for the copy, which is done by the next step."""
        if self._event is not None:
            self._event.synchronize()
        return [float(value) for value in self._values.flatten().tolist()]
