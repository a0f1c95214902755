"""Head drop: attention heads of a pretrained model are left out, and its output projections can be refitted.

The output of attention is a sum over heads; those that are named here are not computed. Nothing is trained: which heads
a model can do without, and the projections that make up for them, come from a calibration
(:mod:`dit_attn.pipelines.head_drop`), whose file ``enable`` takes. A procedure of ours; Mixture-of-Head attention (MoH,
arXiv 2410.11842), which chooses heads by token, is another thing.

With a refit the output projection W, b of the heads that are left becomes ``W + dW, b + db``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from dit_attn.errors import DitAttnError
from dit_attn.processors.core.call import AttentionCall, Request
from dit_attn.processors.core.clock import Clock
from dit_attn.processors.core.parameters import LayerShape
from dit_attn.processors.guidance import heads
from dit_attn.processors.methods.base import setting
from dit_attn.processors.methods.learned import LearnedMethod

Kept = dict[str, tuple[int, ...]]  # layer -> heads that stay; layers that keep all are left out
_BETWEEN = " / "


class RefitProjections(torch.nn.Module):
    """What a refit adds to the output projections of one layer, 0 at first.

    Args:
        sizes: by the name of an output projection and the part of the run: channels of the heads that are left, and of
            a token.

    Attributes:
        to_out_0_weight: (C, |S|) of ``to_out`` in part 0; likewise ``to_add_out``, ``bias`` (C,), and other parts.
    """

    def __init__(self, sizes: Mapping[tuple[str, int], tuple[int, int]]) -> None:
        super().__init__()
        for (stream, part), (kept, channels) in sizes.items():
            weight = torch.zeros(channels, kept, dtype=torch.float32)
            self.register_parameter(f"{stream}_{part}_weight", torch.nn.Parameter(weight))
            self.register_parameter(f"{stream}_{part}_bias", torch.nn.Parameter(weight.new_zeros(channels)))

    def of(self, stream: str, part: int) -> tuple[torch.nn.Parameter, torch.nn.Parameter] | None:
        """Return weight and bias of an output projection in a part of the run, ``None`` where it has none."""
        weight = getattr(self, f"{stream}_{part}_weight", None)
        return None if weight is None else (weight, getattr(self, f"{stream}_{part}_bias"))

    def forward(self, z: torch.Tensor, stream: str, part: int) -> torch.Tensor:
        """Return what is added to the projection of (..., |S|) head outputs, in their dtype."""
        found = self.of(stream, part)
        assert found is not None
        return F.linear(z, *(x.to(z.dtype) for x in found))


@dataclass(frozen=True, kw_only=True)
class HeadDrop(LearnedMethod):
    """Leave attention heads out: the weights of a layer are sliced to the heads that stay.

    Attributes:
        heads: heads to leave out, in any form of :mod:`dit_attn.processors.guidance.heads`, such as
            ``"blocks.3.attn1:0,4"``, for the whole run, or for one part of it after another with ``/`` between. A
            layer keeps one head at least.
        until: where each part but the last ends, fractions of the steps, ascending.

    Raises:
        DitAttnError: heads that cannot be parsed or have a strength, or bounds that do not fit the parts.
    """

    slug: ClassVar[str] = "head-drop"
    role: ClassVar[str] = "heads"

    heads: str = setting("", "heads to leave out, e.g. 'blocks.3.attn1:0,4'; parts of the run with / between")
    until: tuple[float, ...] = setting((), "where each part of the run but the last ends, fractions of the steps")

    def __post_init__(self) -> None:
        given: Any = self.heads
        parts = given.split("/") if isinstance(given, str) and not given.strip().endswith(".json") else [given]
        found = [heads.canonical(part) for part in parts]
        if any("@" in part for part in found):
            raise DitAttnError(f"{self.slug}.heads are left out altogether; leave out the strengths (@)")
        object.__setattr__(self, "heads", _BETWEEN.join(found).strip())
        super().__post_init__()
        if (
            len(self.until) != len(found) - 1
            or list(self.until) != sorted(set(self.until))
            or any(not 0.0 < end < 1.0 for end in self.until)
        ):
            raise DitAttnError(
                f"{self.slug} has {len(found)} parts and until={self.until}; give {len(found) - 1} ascending fractions "
                "between 0 and 1"
            )

    @property
    def parts(self) -> tuple[str, ...]:
        """The heads of every part of the run."""
        return tuple(part.strip() for part in self.heads.split("/"))

    def part_at(self, clock: Clock) -> int:
        """Return the part of the run that the current step is in."""
        return sum(clock.progress >= end - 1e-9 for end in self.until)

    def kept(self, layers: Mapping[str, int | None]) -> tuple[Kept, ...]:
        """Return the heads that stay, for every part of the run.

        Args:
            layers: number of heads of every layer, by name and in order.

        Raises:
            DitAttnError: no such layer or head, or a layer that keeps none.
        """
        return tuple(self._kept(part, layers) for part in self.parts)

    def _kept(self, part: str, layers: Mapping[str, int | None]) -> Kept:
        found = {}
        for name, gone in heads.resolve(part, layers, 1.0).items():
            count = layers[name]
            if count is None or len(gone) >= count:
                raise DitAttnError(f"{self.slug} leaves no head of {name}; a layer keeps one at least")
            found[name] = tuple(head for head in range(count) if head not in gone)
        return found

    def parameters_for(self, shape: LayerShape) -> torch.nn.Module | None:
        """Return the refit of a layer that loses heads, where ``weights`` name one."""
        if self.weights is None or shape.kind != "self":
            return None
        sizes = {}
        for number, part in enumerate(self.parts):
            mine = [entry for entry in part.split(";") if entry.rpartition(":")[0] == shape.name]
            kept = self._kept(";".join(mine), {shape.name: shape.heads}).get(shape.name)
            for stream, channels in shape.outputs if kept else ():
                sizes[stream, number] = (len(kept or ()) * shape.head_dim, channels)
        return RefitProjections(sizes) if sizes else None

    def request(self, call: AttentionCall, request: Request) -> None:
        """Ask for nothing: the heads are gone before attention is computed."""
