"""Base of the methods that learn tensors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from dit_attn.processors.methods.base import Method, setting


@dataclass(frozen=True, kw_only=True)
class LearnedMethod(Method):
    """A method with a module per layer: what ``parameters_for`` returns, trained with the transformer or alone."""

    weights: str | None = setting(None, "folder or org/name with the method's learned tensors; default: untrained")

    def auxiliary_loss(self, modules: Iterable[torch.nn.Module]) -> torch.Tensor | None:
        """Return what a training adds to its loss after a call in training mode, ``None`` for nothing.

        Args:
            modules: of the method's layers.
        """
        return None
