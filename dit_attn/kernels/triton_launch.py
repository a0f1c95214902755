"""A prepared launch of a Triton kernel: it can run on a device, or be compiled for one that is absent."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Launch:
    """A kernel with its grid and arguments.

    Attributes:
        kernel: the jitted function.
        programs: size of the one-dimensional grid.
        arguments: by parameter name.
        warps, stages: launch options.
    """

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    warps: int
    stages: int

    def run(self) -> None:
        """Launch the kernel on the device of its tensors, whichever device is current."""
        if not self.programs:
            return
        device = next(x.device for x in self.arguments.values() if isinstance(x, torch.Tensor))
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            self.kernel[(self.programs,)](**self.arguments, num_warps=self.warps, num_stages=self.stages)
