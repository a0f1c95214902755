"""Which density the statistics of an inspection advise, for all layers and for each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dit_attn.eval.attention_stats import MASS, SELECTED

STEP = 0.05  # densities are advised in steps of this
HALF = 0.5  # above it a sparse kernel has little to save
DENSE = 0.7  # above it too little is skipped to be worth it


@dataclass(frozen=True)
class DensityAdvice:
    """The density at which a selection by block means covers 90 % of the softmax mass.

    Attributes:
        density: for all layers, rounded up; the mean over layers covers the mass.
        layers: by name, the density that each layer would need by itself; NaN where nothing was measured.
        bound: density below which no choice of blocks can cover the mass, mean over layers; NaN if unknown.
        kind, chip: ``good``, ``few`` or ``none``, and a few words.
        sentence: what to set.
        detail: what else to know.
    """

    density: float
    layers: dict[str, float]
    bound: float
    kind: str
    chip: str
    sentence: str
    detail: str


def density_advice(meta: dict[str, Any], tensors: dict[str, torch.Tensor]) -> DensityAdvice | None:
    """Read the density off the recall of block means; ``None`` where it was not measured.

    Between the measured densities the recall is interpolated, with nothing at 0 and everything at 1: where the recall
    is concave, as it is when the best blocks come first, the density is not too low.

    Args:
        meta: ``inspect.json``.
        tensors: by statistic, (branches, layers, steps, heads), NaN for holes.
    """
    recall = {share: tensors[name] for share in SELECTED if (name := f"recall_{share:.0%}".rstrip("%")) in tensors}
    if not recall:
        return None
    means = {share: one.nanmean((0, 2, 3)) for share, one in recall.items()}
    names = meta["axes"]["layer"]
    layers = {
        name: density_for([(share, float(one[i])) for share, one in means.items()]) for i, name in enumerate(names)
    }
    exact = density_for([(share, float(one.nanmean())) for share, one in recall.items()])
    if math.isnan(exact):
        return None
    density = round(math.ceil(exact / STEP - 1e-3) * STEP, 2)
    bound = float(tensors["blocks_90"].nanmean()) if "blocks_90" in tensors else math.nan
    kind, chip = "good", f"density {density:g}"
    if density > DENSE:
        kind, chip = "none", "stay dense"
    elif density > HALF:
        kind = "few"
    return DensityAdvice(density, layers, bound, kind, chip, *_words(meta, density, layers, bound, kind))


def density_for(points: Sequence[tuple[float, float]], mass: float = MASS) -> float:
    """Return the density that covers ``mass`` on the line through (density, covered mass), (0, 0) and (1, 1)."""
    if any(math.isnan(y) for _, y in points):
        return math.nan
    last = (0.0, 0.0)
    for x, y in (*sorted(points), (1.0, 1.0)):
        if y >= mass:
            x0, y0 = last
            return x0 + (x - x0) * (mass - y0) / (y - y0) if y > y0 else x
        last = (x, y)
    return 1.0


def _words(meta: dict[str, Any], density: float, layers: dict[str, float], bound: float, kind: str) -> tuple[str, str]:
    """What to set, and what else to know."""
    covers = f"a selection by the means of {meta['block']}-token blocks covers {100 * MASS:.0f} %"
    if kind == "none":
        sentence = f"Leave it dense: only at density {density:g} {covers} of the attention."
    else:
        sentence = f"Set density={density:g}: then {covers} of the attention."
    parts = []
    known = {name: value for name, value in layers.items() if not math.isnan(value)}
    low, high = min(known, key=known.__getitem__), max(known, key=known.__getitem__)
    if known[high] - known[low] >= 2 * STEP:
        parts.append(f"{low} needs {known[low]:.2f}, {high} {known[high]:.2f}: dit-attn calibrate sets each layer.")
    if not math.isnan(bound):
        parts.append(f"No choice of blocks covers as much below {bound:.2f}.")
    if kind != "good":
        parts.append(
            "Methods that estimate what they skip (rectified-spaattn, re-ttention) manage with less: dit-attn compare "
            "shows at what price."
        )
    return sentence, " ".join(parts)
