"""The guidance update ``c - p``, and the two places where it is added to predictions."""

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
    """Guidance update of the last evaluated step.

    Attributes:
        run: run of the clock.
        step: step at which it was last used.
        weight: w at that step.
        delta: ``c - p``, in float32 (float64 where the model is).
        cond: c.
        evaluated: step at which it was computed.
        measured: position of its last use among the measurements of the run.
    """

    run: int
    step: int
    weight: float
    delta: list[Leaf]
    cond: list[Leaf]
    evaluated: int = 0
    measured: int = -1


class StepHook:
    """Replaces ``scheduler.step`` for one call and adds the guidance update to the prediction the scheduler gets.

    Args:
        scheduler: the scheduler.
        delta: the update.
        first: the first token of the prediction that the scheduler gets, where it does not get all.
    """

    def __init__(self, scheduler: Any, delta: Leaf, first: int = 0) -> None:
        self.scheduler, self.delta, self.first = scheduler, delta, first
        self.before = scheduler.__dict__.get("step")  # set by other code on this very object

    def remove(self) -> None:
        """Restore the scheduler's own step; nothing happens where other code has replaced the hook."""
        if self.scheduler.__dict__.get("step") is not self:
            return
        if self.before is None:
            del self.scheduler.__dict__["step"]
        else:
            self.scheduler.__dict__["step"] = self.before

    def __call__(self, model_output: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self.remove()
        delta = torch.stack(self.delta) if isinstance(self.delta, list) else self.delta
        updated = wide(model_output) + _fitted(delta, model_output, self.first)
        return self.scheduler.step(updated.to(model_output.dtype), *args, **kwargs)


def _fitted(delta: torch.Tensor, like: torch.Tensor, first: int) -> torch.Tensor:
    """Return the update in the shape of the scheduler's predictions.

    That is without the learned variance, the frame axis of an image, and the tokens of text and of reference images.

    Raises:
        DitAttnError: the shapes do not match.
    """
    if delta.ndim == like.ndim + 1:
        delta = delta.squeeze(2)
    if delta.ndim == like.ndim and like.shape[0] % delta.shape[0] == 0:
        delta = torch.cat([delta] * (like.shape[0] // delta.shape[0]))  # Cosmos passes all branches to the scheduler
        if delta.ndim == 3 and delta.shape[1] > like.shape[1]:
            delta = delta[:, first:]
        cut = delta[tuple(slice(0, size) for size in like.shape)]
        if cut.shape == like.shape:
            return cut
    raise DitAttnError(
        f"the scheduler gets predictions of shape {tuple(like.shape)} and the model makes {tuple(delta.shape)}; "
        "use inject='shift'"
    )


def added(output: Any, update: GuidanceDelta, weight: float, index: Sequence[int]) -> Any:
    """Return ``output`` with the update added to the rows ``index``; branch after branch, each with all samples."""
    new: list[Leaf] = []
    for leaf, delta in zip(batch.leaves(output), update.delta, strict=True):
        changed = list(leaf) if isinstance(leaf, list) else leaf.clone()
        for row in index:
            changed[row] = (wide(leaf[row]) + weight * delta[row % len(delta)]).to(leaf[row].dtype)
        new.append(changed)
    return batch.replace_leaves(output, new)


def take_rows(leaf: Leaf, index: Sequence[int]) -> Leaf:
    """Return some rows of a prediction."""
    if isinstance(leaf, list):
        return [leaf[row] for row in index]
    return leaf if len(index) == leaf.shape[0] else leaf[list(index)]


def each(function: Any, *parts: Leaf) -> Leaf:
    """Apply a function to predictions, sample by sample where they are lists of samples."""
    if isinstance(parts[0], list):
        return [function(*items) for items in zip(*parts, strict=True)]
    return function(*parts)


def scaled(leaf: Leaf, weight: float) -> Leaf:
    """Return ``weight`` times a prediction."""
    return each(lambda x: x * weight, leaf)


def flat(leaf: Leaf) -> torch.Tensor:
    """Return a prediction as one vector, in the precision of an update."""
    return torch.cat([wide(x.flatten()) for x in leaf]) if isinstance(leaf, list) else wide(leaf.flatten())
