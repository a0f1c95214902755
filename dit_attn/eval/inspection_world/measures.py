"""How much of a defect an image shows: ratio, fill and leak against the normal image it was made from.

``fill`` alone is fooled on textures: painting the same texture anew changes up to half of a mask, defect or not. The
``ratio`` projects the change on that of true defects, and a redrawn texture has none of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from dit_attn.eval.inspection_world.world import Drawing

VISIBLE = 0.1  # a pixel is changed when a channel, averaged over 3 x 3 pixels, changes by more
HALO = 2  # pixels around the mask that are neither inside nor outside
PASS = (0.5, 1.6)  # ratios that count as the defect


@dataclass(frozen=True)
class Measures:
    """What was found.

    Attributes:
        ratio: change inside the mask along that of true defects: 1 for as much as theirs, 0 for none.
        fill: share of the mask that changed visibly.
        leak: visibly changed pixels beyond the halo, as a share of the image.
    """

    ratio: float
    fill: float
    leak: float

    @property
    def passed(self) -> bool:
        """Whether the ratio is within ``PASS``."""
        return PASS[0] <= self.ratio <= PASS[1]


def mean_change(shots: Sequence[Drawing]) -> np.ndarray:
    """Compute the mean change (3,) that true defects make inside their masks."""
    return np.mean([(shot.image - shot.normal)[shot.mask].mean(0) for shot in shots], axis=0)


def measure(image: np.ndarray, normal: np.ndarray, mask: np.ndarray, reference: np.ndarray) -> Measures:
    """Measure an image against the normal one.

    Args:
        image, normal: (H, W, 3) in [0, 1].
        mask: (H, W) bool, not empty.
        reference: what :func:`mean_change` returned for the type.
    """
    change = image.astype(np.float64) - normal
    ratio = float(change[mask].mean(0) @ reference / (reference @ reference))
    visible = (ndimage.uniform_filter(np.abs(change), (3, 3, 0)) > VISIBLE).any(-1)
    outside = ~ndimage.binary_dilation(mask, iterations=HALO)
    return Measures(ratio, float(visible[mask].mean()), float((visible & outside).mean()))
