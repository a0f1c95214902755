"""Positions of visual tokens that a method asks for: affine maps of their grid coordinates, each for some tokens.

Coordinates are (t, h, w) in tokens of the generated image or video, whose first token is at (0, 0, 0). Reference
tokens have the coordinates at which the model places them, in the same units.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dit_attn.errors import DitAttnError, shorten, unknown
from dit_attn.processors.core.clock import Clock
from dit_attn.processors.core.layer import PLAIN, Layer
from dit_attn.processors.core.tokens import Span

AXES = ("t", "h", "w")
BANDS = ("all", "ntk", "yarn")
_TURNS = (1.0, 32.0)  # over the native length: YaRN scales slower frequencies in full, and faster ones not at all
Axes = tuple[float, float, float]


@dataclass(frozen=True, eq=False)
class PositionMap:
    """Move visual tokens from p to ``origin + scale * (p - origin) + offset``, per axis (t, h, w).

    Attributes:
        scale: factor per axis; 1/2 places twice as many tokens in the range that the model was trained on.
        offset: shift per axis, in tokens.
        origin: point that ``scale`` leaves in place.
        region: visual tokens that are moved, counted among the visual tokens of the sequence: a slice or (Sv,) bool;
            ``None`` for all.
        bands: which frequencies of the rotary embedding are scaled: ``all`` (positions are interpolated); ``ntk``, the
            less the faster they turn (base of the frequencies changed, arXiv 2309.00071 section 3.1); or ``yarn``,
            only those that turn less than once to 32 times over the native length (the same paper, section 3.2).
        anchor: visual token from which h and w are counted: it is at 0 before the map. For a reference image, whose
            place in the model's coordinates need not be known then.
        native: length of the axes that the model was trained at, in tokens; ``yarn`` needs it.

    Raises:
        DitAttnError: a value that is not finite, or a region of another type.
    """

    scale: Axes = (1.0, 1.0, 1.0)
    offset: Axes = (0.0, 0.0, 0.0)
    origin: Axes = (0.0, 0.0, 0.0)
    region: slice | torch.Tensor | None = None
    bands: str = "all"
    native: Axes = (1.0, 1.0, 1.0)
    anchor: int | None = None

    def __post_init__(self) -> None:
        if self.bands not in BANDS:
            raise unknown("bands of a PositionMap", self.bands, BANDS)
        for name in ("scale", "offset", "origin", "native"):
            value = getattr(self, name)
            numbers = isinstance(value, (tuple, list)) and all(isinstance(item, (int, float)) for item in value)
            if not numbers or len(value) != len(AXES) or not all(map(math.isfinite, value)):
                raise DitAttnError(
                    f"{name} of a PositionMap must be three finite numbers (t, h, w), got {shorten(value)}"
                )
            object.__setattr__(self, name, tuple(map(float, value)))
        region = self.region
        if isinstance(region, torch.Tensor) and (region.dtype != torch.bool or region.ndim != 1):
            raise DitAttnError(
                f"the region of a PositionMap must be (Sv,) bool, the same for all batch rows, got "
                f"{tuple(region.shape)} {region.dtype}"
            )
        if not isinstance(region, (slice, torch.Tensor, type(None))):
            raise DitAttnError(f"the region of a PositionMap must be a slice or (Sv,) bool, got {shorten(region)}")

    @property
    def moves(self) -> bool:
        """Whether it can move a token at all."""
        return self.scale != (1.0, 1.0, 1.0) or self.offset != (0.0, 0.0, 0.0) or self.anchor is not None

    def __str__(self) -> str:
        moves = []
        for axis, scale, offset in zip(AXES, self.scale, self.offset):
            numbers = [*([f"x{scale:g}"] if scale != 1.0 else ()), *([f"{offset:+g}"] if offset else ())]
            moves += [f"{axis} {' '.join(numbers)}"] if numbers else []
        bands = "" if self.bands == "all" else f" ({self.bands})"
        return f"{', '.join(moves) or 'nothing'}{bands}{'' if self.region is None else ' in a region'}"

    def same(self, other: PositionMap) -> bool:
        """Return whether both move the same tokens in the same way."""
        mine, others = ((x.scale, x.offset, x.origin, x.bands, x.native, x.anchor) for x in (self, other))
        return mine == others and _same_region(self.region, other.region)


@dataclass(frozen=True)
class PositionSite:
    """Where positions are asked for: one self-attention layer, before it runs.

    Attributes:
        layer: the layer.
        visual: spans of the visual tokens, ``start`` counted among the visual tokens.
        clock: position in the run.
        branches: guidance branch of every batch row of the transformer call.
        layer_count: number of wrapped self-attention layers of the transformer.
        pass_name: of the pass through the transformer, as in an attention call.
    """

    layer: Layer
    visual: tuple[Span, ...]
    clock: Clock
    branches: tuple[str, ...] = ()
    layer_count: int = 1
    pass_name: str = PLAIN

    @property
    def num_tokens(self) -> int:
        """Number of visual tokens."""
        return sum(span.length or 0 for span in self.visual)

    @property
    def grid(self) -> tuple[int, int, int] | None:
        """(T, H, W) of the generated image or video."""
        return next((span.grid for span in self.visual if span.kind != "reference"), None)


def displacement(maps: Sequence[PositionMap], coordinates: torch.Tensor) -> torch.Tensor:
    """Return how far maps move every visual token, each map applied to what the maps before it left.

    Args:
        maps: the maps, in order.
        coordinates: (Sv, 3) fp64, NaN where unknown.

    Returns:
        (Sv, 3) fp64, exactly 0 where nothing moves; NaN where a token of unknown coordinates is scaled.

    Raises:
        DitAttnError: a region of another length.
    """
    count = coordinates.shape[0]
    factor, shift = torch.ones_like(coordinates), torch.zeros_like(coordinates)
    for item in maps:
        scale, offset, origin = (coordinates.new_tensor(x) for x in (item.scale, item.offset, item.origin))
        rows = torch.ones(count, dtype=torch.bool)
        if isinstance(item.region, torch.Tensor):
            if item.region.shape[0] != count:
                raise DitAttnError(f"a region has {item.region.shape[0]} tokens; the sequence has {count} visual ones")
            rows = item.region.cpu()
        elif item.region is not None:
            rows = torch.zeros(count, dtype=torch.bool)
            rows[item.region] = True
        if item.anchor is not None:
            first = factor[item.anchor] * coordinates[item.anchor] + shift[item.anchor]
            offset = offset - scale * first * torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64)
        shift = torch.where(rows[:, None], scale * shift + (1 - scale) * origin + offset, shift)
        factor = torch.where(rows[:, None], scale * factor, factor)
    return torch.where(factor == 1, shift, (factor - 1) * coordinates + shift)


def band_weights(maps: Sequence[PositionMap], frequencies: torch.Tensor) -> torch.Tensor | None:
    """Return the share of a displacement that every frequency takes, (3, K) fp64; ``None`` where all take all of it.

    A frequency whose scale is s_k rather than s moves tokens by ``(s_k - 1) / (s - 1)`` of what s does.

    Args:
        maps: as for :func:`displacement`.
        frequencies: (3, K) fp64, radians per token; 0 for columns of another axis.

    Raises:
        DitAttnError: a map of some frequencies next to another map.
    """
    if all(item.bands == "all" for item in maps):
        return None
    if len(maps) > 1 or any(maps[0].offset):
        raise DitAttnError("positions cannot be scaled by frequency and moved at once; take rotary=interpolated")
    (item,) = maps
    weights = torch.ones_like(frequencies)
    for axis, (scale, native) in enumerate(zip(item.scale, item.native)):
        theta = frequencies[axis].abs()
        used = theta > 0
        if scale == 1.0 or not used.any():
            continue
        if item.bands == "ntk":
            slowness = (theta[used].max() / theta[used]).log()
            scales = scale ** (slowness / slowness.max().clamp(min=1e-12))
        else:
            low, high = _TURNS
            kept = ((theta[used] * native / (2 * math.pi) - low) / (high - low)).clamp(0.0, 1.0)
            scales = scale * (1.0 - kept) + kept
        weights[axis, used] = (scales - 1.0) / (scale - 1.0)
    return weights


def _same_region(a: slice | torch.Tensor | None, b: slice | torch.Tensor | None) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a is b or (a.shape == b.shape and a.device == b.device and torch.equal(a, b))
    return type(a) is type(b) and a == b
