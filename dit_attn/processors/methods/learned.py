"""Base of the methods that learn tensors."""

from __future__ import annotations

from dataclasses import dataclass

from dit_attn.processors.methods.base import Method, setting


@dataclass(frozen=True, kw_only=True)
class LearnedMethod(Method):
    """A method with a module per layer: what ``parameters_for`` returns, trained with the transformer or alone."""

    weights: str | None = setting(None, "folder or org/name with the method's learned tensors; default: untrained")
