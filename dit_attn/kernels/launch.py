"""One launch of a Triton kernel, put together apart from its start: for a device or for a compiler alone."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Launch:
    """A kernel, its grid and everything it is called with."""

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    warps: int
    stages: int

    def run(self) -> None:
        """Start the kernel on the device of its tensors, whichever is current."""
        if not self.programs:
            return
        device = next(x.device for x in self.arguments.values() if isinstance(x, torch.Tensor))
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            self.kernel[(self.programs,)](**self.arguments, num_warps=self.warps, num_stages=self.stages)
