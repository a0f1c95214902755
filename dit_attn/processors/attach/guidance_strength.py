"""Measure how far a guidance method moves the predictions of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from dit_attn.processors.attach import batch
from dit_attn.processors.attach.batch import Leaf
from dit_attn.processors.attach.guidance_delta import GuidanceDelta, flat, scaled, take_rows


@dataclass
class GuidanceStrength:
    """Strength of the guidance in a run, compared with the direction of classifier-free guidance.

    Attributes:
        parallel: by step, the component of the update along ``c - u``, in units of it: the equivalent guidance scale.
        orthogonal: by step, the orthogonal component, in units of ``|c - u|``.
        relative: by step, ``|D| / |c|``.
    """

    parallel: list[float] = field(default_factory=list)
    orthogonal: list[float] = field(default_factory=list)
    relative: list[float] = field(default_factory=list)

    @property
    def steps(self) -> int:
        """Number of guided steps measured."""
        return len(self.relative)


class StrengthLog:
    """Inner products of the updates of a run, on the device."""

    def __init__(self) -> None:
        self._products: list[tuple[torch.Tensor, ...]] = []

    def add(self, update: GuidanceDelta, output: Any, branches: Sequence[str], channels: int = 0) -> None:
        """Store the products of an update with itself, with c and with ``c - u``, where u is known.

        Args:
            update: the update.
            output: what the transformer returned.
            branches: guidance branch of every row.
            channels: channels of the latents, which predictions with a learned variance have twice; 0 where unknown.
        """
        delta, cond = (_predicted(leaf, channels) for leaf in (scaled(update.delta[0], update.weight), update.cond[0]))
        if "cond" in branches:
            update.measured = len(self._products)
            self._products.append((delta @ delta, cond @ cond))
        if "uncond" not in branches or len(self._products[update.measured]) != 2:
            return
        uncond = take_rows(batch.leaves(output)[0], [i for i, name in enumerate(branches) if name == "uncond"])
        direction = cond - _predicted(uncond, channels)
        self._products[update.measured] = (*self._products[update.measured], delta @ direction, direction @ direction)

    @property
    def strength(self) -> GuidanceStrength:
        """The strength over the guided steps (reads back from the device)."""
        result = GuidanceStrength()
        for size, cond, *against in self._products:
            result.relative.append(float((size / cond.clamp(min=1e-30)).sqrt()))
            if against:
                along, direction = (float(value) for value in against)
                if direction > 0:
                    result.parallel.append(along / direction)
                    result.orthogonal.append((max(0.0, float(size) - along**2 / direction) / direction) ** 0.5)
        return result

    @property
    def unmoved(self) -> int:
        """Guided steps whose update was exactly 0 (reads back from the device)."""
        return sum(float(size) == 0.0 for size, *_ in self._products)


def _predicted(leaf: Leaf, channels: int) -> torch.Tensor:
    """Return a prediction as one vector, without the variance that some models learn and pipelines cut off."""
    if isinstance(leaf, torch.Tensor) and leaf.ndim == 4 and leaf.shape[1] == 2 * channels:
        leaf = leaf[:, :channels]
    return flat(leaf)
