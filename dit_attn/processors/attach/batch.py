"""Select rows of a batch in the arguments of a model call, and predictions in its output."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree  # its public wrapper came with torch 2.6 and takes no is_leaf

from dit_attn.processors.attach.families import Axis

Leaf = torch.Tensor | list[torch.Tensor]  # (B, ...), or one tensor for every sample


def take(value: Any, index: Sequence[int], rows: int, axis: int = 0) -> Any:
    """Return ``value`` with the rows ``index`` of everything that has ``rows`` of them along ``axis``.

    Args:
        value: a tensor, a list with an entry per sample, or nested containers of them.
        index: the rows; one may be taken twice.
        rows: batch rows of the model call.
        axis: batch axis of the tensors.
    """

    def per_sample(item: Any) -> bool:
        if not isinstance(item, list) or len(item) != rows:
            return False
        return not all(isinstance(x, torch.Tensor) and x.ndim > axis and x.shape[axis] == rows for x in item)

    def taken(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor) and leaf.ndim > axis and leaf.shape[axis] == rows:
            return leaf.index_select(axis, torch.tensor(list(index), device=leaf.device))
        return [leaf[row] for row in index] if isinstance(leaf, list) else leaf

    return pytree.tree_map(taken, value, is_leaf=per_sample)


def take_call(
    model: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    index: Sequence[int],
    rows: int,
    axes: Mapping[str, Axis],
) -> dict[str, Any]:
    """Return the arguments of a call for some rows of its batch, by name.

    Args:
        model: the model, or one of its blocks, whose ``forward`` is called.
        args, kwargs: the arguments of the full batch.
        index: the rows.
        rows: rows of the full batch.
        axes: batch axis of an argument, when not the first; see ``Family.batch_axes``.
    """

    def taken(value: Any, axis: Axis) -> Any:
        if axis is None:
            return value
        if axis == "list" and isinstance(value, list):
            return [value[row] for row in index]
        return take(value, index, rows, axis if isinstance(axis, int) else 0)

    return {name: taken(value, axes.get(name, 0)) for name, value in by_name(model, args, kwargs).items()}


def by_name(model: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call of ``model.forward`` by name."""
    names = list(inspect.signature(type(model).forward).parameters)[1:]
    return {**dict(zip(names, args)), **kwargs}


def leaves(output: Any) -> list[Leaf]:
    """Return the predictions in a model output: tensors (B, ...), or lists with a tensor for every sample."""
    return [leaf for leaf in pytree.tree_leaves(output, is_leaf=_is_samples) if _is_prediction(leaf)]


def replace_leaves(output: Any, new: Sequence[Leaf]) -> Any:
    """Return ``output`` with other predictions, in the order of :func:`leaves`."""
    flat, spec = pytree.tree_flatten(output, is_leaf=_is_samples)
    rest = iter(new)
    return pytree.tree_unflatten([next(rest) if _is_prediction(leaf) else leaf for leaf in flat], spec)


def _is_samples(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], torch.Tensor)


def _is_prediction(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) or _is_samples(leaf)
