"""A model that draws new masks: what it consists of, the canvas it sees masks on, and what counts as a mask.

Masks are images to it. A mask lies in the middle of a square canvas that is a little larger than the largest box, the
same for all shots of a pair: sizes and shapes are learned, places are not. Those are chosen on the product, as for any
other source of masks. (Mask textual inversion, AnomalyDiffusion, Hu et al., AAAI 2024: there one embedding per pair and
entire images.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage

from dit_attn.pipelines.anomaly.mask_shapes import describe
from dit_attn.pipelines.anomaly.masks import boxed
from dit_attn.pipelines.anomaly.views import View

THRESHOLD = 0.5  # gray value in [0, 1] from which a pixel is in the mask
_ROOM = 1.6  # side of the canvas over that of the largest box
_SMALLEST = 16  # pixels along a canvas
_SPECK = 0.1  # parts smaller than this share of the largest one are dropped
# How far a mask may go beyond the shots: factors of the least and the largest of them.
_LIMITS = {"area": (0.5, 2.0), "number of parts": (0.0, 1.0), "elongation": (1 / 1.5, 1.5), "roughness": (0.0, 1.3)}


@dataclass(frozen=True)
class MaskModelSettings:
    """What a mask model consists of; stored in the file of its concept.

    Attributes:
        tokens: vectors of a pair.
        lora_rank: 0 for no LoRA.
        steps: trained.
        canvas: side of the canvas in pixels, by pair.
        usable: share of the trial masks that could be used, by pair.
    """

    tokens: int = 4
    lora_rank: int = 8
    steps: int = 0
    canvas: dict[str, int] = field(default_factory=dict)
    usable: dict[str, float] = field(default_factory=dict)


class MaskModel(torch.nn.Module):
    """The learned vectors of some pairs' masks, (pairs, tokens, width), and the state of their LoRA.

    Args:
        settings: what it consists of.
        pairs: how many.
        width: of the text's vectors.

    Attributes:
        lora: weights of the LoRA by name; empty before training.
    """

    def __init__(self, settings: MaskModelSettings, pairs: int, width: int):
        super().__init__()
        self.settings = settings
        self.vectors = torch.nn.Parameter(torch.zeros(pairs, settings.tokens, width))
        self.lora: dict[str, torch.Tensor] = {}


def canvas_side(shapes: Sequence[np.ndarray]) -> int:
    """Return the side of the canvas, in pixels, for the masks of a pair."""
    return max(_SMALLEST, math.ceil(_ROOM * max(max(boxed(shape).shape) for shape in shapes)))


def on_canvas(shape: np.ndarray, side: int, size: int, rng: np.random.Generator) -> torch.Tensor:
    """Lay a mask near the middle of a canvas, as the model sees it: (3, size, size) in {0, 1}.

    Args:
        shape: (h, w) bool.
        side: of the canvas, in pixels of the mask.
        size: pixels at which the model works.
        rng: of the place: up to a twentieth of the side from the middle.
    """
    part = boxed(shape)
    reach = max(1, side // 20)
    middle = [(side - length) // 2 + int(rng.integers(-reach, reach + 1)) for length in part.shape]
    top, left = (min(max(0, at), side - length) for at, length in zip(middle, part.shape))
    canvas = np.zeros((side, side), bool)
    canvas[top : top + part.shape[0], left : left + part.shape[1]] = part
    return View(0, 0, side, side, size).mask(canvas).expand(3, -1, -1)


def mask_of(drawn: torch.Tensor, side: int, shapes: Sequence[np.ndarray]) -> tuple[np.ndarray, str]:
    """Turn what the model drew into a mask.

    Args:
        drawn: (3, size, size) in [0, 1].
        side: of the canvas, in pixels.
        shapes: masks of the shots.

    Returns:
        The mask, (side, side) bool without specks, and why it cannot be used, ``""`` if it can.
    """
    gray = drawn.float().mean(0)[None, None]
    if gray.shape[2:] != (side, side):
        gray = F.interpolate(gray, (side, side), mode="bilinear", antialias=True, align_corners=False)
    found = gray[0, 0].numpy() > THRESHOLD
    labels, _ = ndimage.label(found, np.ones((3, 3)))
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    kept = (sizes >= max(1.0, _SPECK * sizes.max()))[labels]
    return kept, mask_problem(kept, shapes)


def mask_problem(mask: np.ndarray, shapes: Sequence[np.ndarray]) -> str:
    """Return why a mask on its canvas cannot be used, ``""`` if it can: it must look like the masks of the shots."""
    if not mask.any():
        return "it is empty"
    if mask[[0, -1]].any() or mask[:, [0, -1]].any():
        return "it is cut off by the border"
    found, shots = describe(mask), [describe(shape) for shape in shapes]
    for name, (low, high) in _LIMITS.items():
        values = [shot[name] for shot in shots]
        if not low * min(values) <= found[name] <= high * max(values):
            own = f"{min(values):.3g} to {max(values):.3g}"
            return f"its {name} is {found[name]:.3g}, that of the shots {own}"
    return ""
