"""Records of a comparison: its variants, and the results of every item."""

from __future__ import annotations

import types
import typing
from dataclasses import dataclass, field
from typing import Any

from dit_attn.processors.methods.base import Method


@dataclass(frozen=True)
class Variant:
    """One way to run the pipeline.

    Attributes:
        label: unique name for tables.
        methods: enabled methods; none is dense.
        call: arguments of the pipeline's call that differ for this variant, as pairs of name and value.
    """

    label: str
    methods: tuple[Method, ...] = ()
    call: tuple[tuple[str, Any], ...] = ()

    @property
    def is_baseline(self) -> bool:
        """Whether this is the stock pipeline with the call all variants share."""
        return not self.methods and not self.call


DENSE = Variant("dense")


@dataclass
class ItemResult:
    """Result of one item (a prompt and a seed) by one variant. JSON values only.

    Attributes:
        variant: label of the variant.
        index, prompt, seed: of the item.
        file: output, relative to the folder of the comparison; ``None`` in memory or when it failed.
        seconds: time of the pipeline call.
        dense_seconds: time of the dense call of the same round.
        density: attention computed in the sparse calls, as a fraction of dense; ``None`` without sparse calls.
        run_density: the same over all attention calls; fallbacks count as dense.
        psnr: in dB to the dense item, ``None`` where the pixels are equal.
        ssim: to the dense item.
        equal: whether the pixels equal those of the dense item.
        saturation: mean over the pixels of largest minus smallest channel, in [0, 1]; strong guidance raises it.
        parallel, sideways: parallel and orthogonal component of the guidance update, see
            :class:`~dit_attn.processors.attach.summary.GuidanceSummary`.
        temporal: temporal consistency of a video (``eval.fidelity.temporal_consistency``), ``None`` for images.
        attention_share: fraction of the floating-point operations of a dense step that attention takes at this size.
        verdict: whether the pixels show each attribute of the caption; ``None`` for prompts outside the shapes world.
        error: one line, when the item failed.
        warnings: warnings of ``summary``, such as requested guidance that did not happen.
    """

    variant: str
    index: int
    prompt: str
    seed: int
    file: str | None = None
    seconds: float | None = None
    dense_seconds: float | None = None
    density: float | None = None
    run_density: float | None = None
    psnr: float | None = None
    ssim: float | None = None
    equal: bool | None = None
    saturation: float | None = None
    parallel: float | None = None
    sideways: float | None = None
    temporal: float | None = None
    attention_share: float | None = None
    verdict: dict[str, bool] | None = None
    error: str | None = None
    warnings: list[str] = field(default_factory=list)

    @classmethod
    def from_json(cls, data: Any) -> ItemResult | None:
        """Return the result that ``asdict`` wrote; ``None`` where a field is missing or of another type."""
        hints = typing.get_type_hints(cls)
        if not isinstance(data, dict) or set(data) != set(hints):
            return None
        if not all(fits(data[name], hint) for name, hint in hints.items()):
            return None
        return cls(**data)


def fits(value: Any, hint: Any) -> bool:
    """Tell whether a value of a JSON file is of a type: a union, list, dict or plain type; numbers must be finite."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return any(fits(value, kind) for kind in inner)
    if origin is list:
        return isinstance(value, list) and all(fits(item, inner[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(fits(item, inner[1]) for item in value.values())
    if isinstance(value, bool) or hint not in (int, float):
        return isinstance(value, hint)
    number = isinstance(value, int) or (hint is float and isinstance(value, float))
    return number and abs(value) < 1e300  # NaN is not either
