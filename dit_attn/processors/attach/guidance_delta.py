"""A push ``c - p``: its parts, and the two places where it is added to predictions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dit_attn.errors import DitAttnError
from dit_attn.processors.attach import batch
from dit_attn.processors.attach.batch import Leaf
from dit_attn.processors.guidance.perturbation import wide


@dataclass
class GuidanceDelta:
    """``c - p`` of the last evaluated step, in float32 (float64 where the model is), and c itself."""

    run: int
    step: int
    weight: float
    delta: list[Leaf]
    cond: list[Leaf]


class StepTap:
    """Stands in for ``scheduler.step`` for one call and adds the push to the prediction the scheduler gets."""

    def __init__(self, scheduler: Any, delta: Leaf) -> None:
        self.scheduler, self.delta = scheduler, delta
        self.before = scheduler.__dict__.get("step")  # somebody else's, on this very object

    def remove(self) -> None:
        """Give the scheduler back what it had."""
        if self.before is None:
            del self.scheduler.__dict__["step"]
        else:
            self.scheduler.__dict__["step"] = self.before

    def __call__(self, model_output: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self.remove()
        delta = torch.stack(self.delta) if isinstance(self.delta, list) else self.delta
        pushed = wide(model_output) + _fitted(delta, model_output)
        return self.scheduler.step(pushed.to(model_output.dtype), *args, **kwargs)


def _fitted(delta: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The push in the form the scheduler gets predictions in: without the learned variance, the frame axis of a
    picture, the tokens of reference images.

    Raises:
        DitAttnError: the two have nothing to do with each other.
    """
    if delta.ndim == like.ndim + 1:
        delta = delta.squeeze(2)
    if delta.ndim == like.ndim and like.shape[0] % delta.shape[0] == 0:
        delta = torch.cat([delta] * (like.shape[0] // delta.shape[0]))  # Cosmos hands all branches on
        cut = delta[tuple(slice(0, size) for size in like.shape)]
        if cut.shape == like.shape:
            return cut
    raise DitAttnError(
        f"the scheduler gets predictions of shape {tuple(like.shape)} and the model makes {tuple(delta.shape)}; "
        "use inject='shift'"
    )


def added(output: Any, push: GuidanceDelta, weight: float, index: Sequence[int]) -> Any:
    """``output`` with the push on the rows ``index``; branches stand one after the other, each with all samples."""
    new: list[Leaf] = []
    for leaf, delta in zip(batch.leaves(output), push.delta, strict=True):
        pushed = list(leaf) if isinstance(leaf, list) else leaf.clone()
        for row in index:
            pushed[row] = (wide(leaf[row]) + weight * delta[row % len(delta)]).to(leaf[row].dtype)
        new.append(pushed)
    return batch.rebuilt(output, new)


def take_rows(leaf: Leaf, index: Sequence[int]) -> Leaf:
    """Some rows of a prediction."""
    if isinstance(leaf, list):
        return [leaf[row] for row in index]
    return leaf if len(index) == leaf.shape[0] else leaf[list(index)]


def each(function: Any, *parts: Leaf) -> Leaf:
    """A function of predictions, sample by sample where they are lists of samples."""
    if isinstance(parts[0], list):
        return [function(*items) for items in zip(*parts, strict=True)]
    return function(*parts)


def scaled(leaf: Leaf, weight: float) -> Leaf:
    """``weight`` times a prediction."""
    return each(lambda x: x * weight, leaf)


def flat(leaf: Leaf) -> torch.Tensor:
    """A prediction as one vector, in the precision of a push."""
    return torch.cat([wide(x.flatten()) for x in leaf]) if isinstance(leaf, list) else wide(leaf.flatten())
