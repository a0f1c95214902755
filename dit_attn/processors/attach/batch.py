"""DOC"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from dit_attn.processors.attach.families import Axis

Leaf = torch.Tensor | list[torch.Tensor]  # (B, ...), or one tensor for every sample


def take(value: Any, index: Sequence[int], rows: int, axis: int = 0) -> Any:
    """The rows ``index`` of everything in ``value`` that has ``rows`` of them along ``axis``; the rest as it is.

    Args:
        value: a tensor, a list with an entry per sample, or tuples, lists and dictionaries of them.
        index: the wanted rows; one may be wanted twice.
        rows: batch rows of the model call.
        axis: where tensors have their batch.
    """
    if isinstance(value, torch.Tensor):
        if value.ndim > axis and value.shape[axis] == rows:
            return value.index_select(axis, torch.tensor(list(index), device=value.device))
        return value
    if isinstance(value, list):
        batched = all(isinstance(item, torch.Tensor) and item.ndim and item.shape[0] == rows for item in value)
        if len(value) == rows and not batched:
            return [value[row] for row in index]
        return [take(item, index, rows, axis) for item in value]
    if type(value) is tuple:
        return tuple(take(item, index, rows, axis) for item in value)
    if isinstance(value, dict):
        return {name: take(item, index, rows, axis) for name, item in value.items()}
    return value


def take_call(
    model: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    index: Sequence[int],
    rows: int,
    axes: Mapping[str, Axis],
) -> dict[str, Any]:
    """The arguments of a call for some rows of its batch, by name.

    Args:
        model: the model, or one of its blocks, whose ``forward`` is called.
        args, kwargs: the arguments of the whole batch.
        index: the wanted rows.
        rows: rows of the whole batch.
        axes: where an argument has its batch, when not on its first axis; see ``Family.batch_axes``.
    """
    names = list(inspect.signature(type(model).forward).parameters)[1:]

    def taken(value: Any, axis: Axis) -> Any:
        if axis is None:
            return value
        if axis == "list" and isinstance(value, list):
            return [value[row] for row in index]
        return take(value, index, rows, axis if isinstance(axis, int) else 0)

    values = {**dict(zip(names, args)), **kwargs}
    return {name: taken(value, axes.get(name, 0)) for name, value in values.items()}


def leaves(output: Any) -> list[Leaf]:
    """The predictions in a model output: tensors (B, ...), or lists with a tensor for every sample."""
    if isinstance(output, torch.Tensor):
        return [output]
    if isinstance(output, list):
        return [output] if output and isinstance(output[0], torch.Tensor) else []
    items = output.values() if isinstance(output, dict) else output if isinstance(output, tuple) else ()
    return [leaf for item in items for leaf in leaves(item)]


def rebuilt(output: Any, new: list[Leaf]) -> Any:
    """``output`` with other predictions; ``new`` is used up."""
    if isinstance(output, torch.Tensor) or (
        isinstance(output, list) and output and isinstance(output[0], torch.Tensor)
    ):
        return new.pop(0)
    if isinstance(output, dict):
        return type(output)(**{name: rebuilt(item, new) for name, item in output.items()})
    if isinstance(output, tuple):
        return tuple(rebuilt(item, new) for item in output)
    return output
