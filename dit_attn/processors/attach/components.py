"""Name the transformers of a pipeline."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

COMPONENTS = ("transformer", "transformer_2", "transformer_ref", "unconditional_transformer")
"""Names of a pipeline's transformers: Wan 2.2 has two, MiniMax-H3 one for runs with references, Ideogram 4 one for the
unconditional branch."""


def unwrap(model: Any) -> Any:
    """Return the transformer behind ``torch.compile`` and data-parallel wrappers."""
    while hasattr(model, "_orig_mod") or type(model).__name__ in ("DistributedDataParallel", "DataParallel"):
        model = getattr(model, "_orig_mod", None) or model.module
    return model


def has_component(pipe: Any, model: torch.nn.Module) -> bool:
    """Return whether ``model`` is one of the transformers of ``pipe``."""
    return any(unwrap(getattr(pipe, name, None)) is model for name in COMPONENTS)


def component_name(pipe: Any, model: torch.nn.Module) -> str:
    """Return the name of a transformer in its pipeline; the first one's where there is no pipeline."""
    return next((name for name in COMPONENTS if unwrap(getattr(pipe, name, None)) is model), COMPONENTS[0])


def is_data_parallel(part: Any) -> bool:
    """Return whether a transformer stands behind a data-parallel wrapper."""
    while hasattr(part, "_orig_mod"):
        part = part._orig_mod
    return unwrap(part) is not part


def is_of_class(value: Any, kind: type) -> bool:
    """Return whether ``value`` is of class ``kind``, or of what that class was before its module was loaded again."""
    return (type(value).__module__, type(value).__qualname__) == (kind.__module__, kind.__qualname__)
