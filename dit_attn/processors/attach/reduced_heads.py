"""Give the layers of a transformer the heads that a method leaves them, in every part of the run."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from dit_attn.processors.attach.layer_shape import head_count
from dit_attn.processors.attach.reduced_attention import can_slice, reduced, weights_key
from dit_attn.processors.core.clock import Clock
from dit_attn.processors.core.layer import Layer
from dit_attn.processors.methods.base import Method


@dataclass(frozen=True)
class HeadDropReport:
    """What was left out in a run.

    Attributes:
        heads: number of heads of all layers.
        dropped: heads left out, for every part of the run.
        projected: layers that still project all heads; attention is computed for those that stay.
        warnings: none.
    """

    heads: int
    dropped: list[int]
    projected: int = 0
    warnings: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        gone = ", then ".join(map(str, self.dropped))
        text = f"{gone} of {self.heads} heads left out"
        return text + (f"; {self.projected} layers project all of them" if self.projected else "")


class ReducedHeads:
    """The heads of every layer on one transformer, and the reduced attention modules.

    Args:
        method: the method.
        model: the transformer.
        layers: its layers.

    Attributes:
        rebuilt: whether the last call made modules anew, since weights or the part of the run have changed.

    Raises:
        DitAttnError: heads that the model does not have, or a layer that keeps none.
    """

    def __init__(self, method: Method, model: torch.nn.Module, layers: Sequence[Layer]) -> None:
        self.method, self.rebuilt = method, False
        mine = [layer.name for layer in layers if layer.kind == "self"]
        self.counts = {name: head_count(model.get_submodule(name)) for name in mine}
        self.kept = method.kept(self.counts)
        self._made: dict[tuple[str, int], tuple[Any, Any]] = {}

    def copy(self) -> ReducedHeads:
        """Return that of a copied transformer, whose modules need not be there yet."""
        found = copy.copy(self)
        found._made = {}
        return found

    def fewest(self, name: str, count: int | None) -> int | None:
        """Return the number of heads that a layer has at least, of ``count``."""
        found = [len(kept[name]) for kept in self.kept if name in kept]
        return min(found) if found else count

    def begin_call(self, clock: Clock, layers: Sequence[Layer], module: Callable[[Layer], Any]) -> None:
        """Give every layer its heads of the current part of the run.

        Args:
            clock: position in the run.
            layers: of the transformer.
            module: returns the stock attention module of a layer.
        """
        part, self.rebuilt = self.method.part_at(clock), False
        for layer in layers:
            kept = self.kept[part].get(layer.name)
            found = None if kept is None else self._reduced(layer, module(layer), kept, part)
            self.rebuilt |= layer.reduced is not found
            layer.reduced = found
            layer.kept_heads = None if kept is None or can_slice(module(layer)) else kept

    def _reduced(self, layer: Layer, attention: Any, kept: tuple[int, ...], part: int) -> Any:
        refit: Any = layer.learned.get(id(self.method))
        key = (id(attention), attention.processor, *weights_key(attention, refit))
        if (layer.name, part) not in self._made or self._made[layer.name, part][0] != key:
            self._made[layer.name, part] = key, reduced(attention, kept, refit, part)
        return self._made[layer.name, part][1]

    def report(self, layers: Sequence[Layer]) -> HeadDropReport:
        """Return what is left out."""
        counts = {name: count or 0 for name, count in self.counts.items()}
        dropped = [sum(counts[name] - len(kept) for name, kept in part.items()) for part in self.kept]
        return HeadDropReport(sum(counts.values()), dropped, sum(layer.kept_heads is not None for layer in layers))
