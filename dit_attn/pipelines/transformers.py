"""Find the diffusion transformers of a pipeline and count their forward passes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from dit_attn.processors.attach.components import COMPONENTS


def transformers_of(pipe: Any) -> dict[str, torch.nn.Module]:
    """Return the transformers of a pipeline by component name; Wan 2.2 has two."""
    found = {name: getattr(pipe, name, None) for name in COMPONENTS}
    return {name: model for name, model in found.items() if model is not None}


@dataclass
class PassCount:
    """Transformer passes of a run, counted per sample.

    Attributes:
        samples: sum of the batch sizes of all passes.
    """

    samples: int = 0


@contextmanager
def count_passes(pipe: Any) -> Iterator[PassCount]:
    """Count the samples that pass through the transformers of a pipeline within a ``with`` block.

    The perturbed pass of a guidance method is not counted.
    """
    count = PassCount()

    def before(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        latents = kwargs.get("hidden_states", args[0] if args else None)
        count.samples += len(latents) if latents is not None else 1

    handles = [model.register_forward_pre_hook(before, with_kwargs=True) for model in transformers_of(pipe).values()]
    try:
        yield count
    finally:
        for handle in handles:
            handle.remove()
