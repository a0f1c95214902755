"""Accept or reject a generated pair: does the mask hold the defect, or only the texture painted anew?

On a texture, painting a mask anew changes much of it, defect or not; a difference to the normal image is no evidence.
The gate compares looks instead. ``looks`` describes the inside of a mask against the ring around it; the real shots say
how a defect looks (1), the same masks laid on normal images how none does (0). A pair's ``ratio`` is its place on the
line between the two, weighted by how well each number tells them apart (Fisher's discriminant with a diagonal
covariance). The threshold lies where normal images hardly come; their own scores are reported beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from scipy import ndimage

LOW, HIGH = 0.5, 1.6  # ratios that are accepted: half a real defect to 1.6 of one
_CONTROL_SHARE = 0.95  # of the normal controls lies below the threshold
_MIN_FILL = 0.5  # of a mask, and a third of it in each of its larger parts
_MIN_PART_FILL = 0.15
_PART = 0.15  # of the mask: smaller parts are not asked for


@dataclass(frozen=True)
class Scores:
    """What was measured of a pair.

    Attributes:
        ratio: 1 for as much of the defect as the real ones show, 0 for none.
        fill: share of the mask whose change goes at least a fifth of the way to a real defect's.
        leak: visible change beyond the mask before compositing, as a share of the view.
        part_fill: the lowest fill of a larger part of the mask.
    """

    ratio: float
    fill: float
    leak: float
    part_fill: float


def looks(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Describe the inside of a mask against the ring around it: 8 numbers.

    Difference of the mean color, of the darkest and brightest tenth, of the contrast, and mean absolute difference to
    the ring's mean; all in units of the full range.

    Args:
        image: (H, W, 3) in [0, 1].
        mask: (H, W) bool, not empty.
    """
    near = ndimage.binary_dilation(mask, iterations=2)
    ring = ndimage.binary_dilation(near, iterations=max(3, int(np.sqrt(mask.sum()) / 2))) & ~near
    inside, around = image[mask], image[ring] if ring.any() else image[~mask]
    gray, out = inside.mean(-1), around.mean(-1)
    edges = [np.quantile(gray, q) - np.quantile(out, q) for q in (0.1, 0.9)]
    far = np.abs(inside - around.mean(0)).mean() - np.abs(around - around.mean(0)).mean()
    color = inside.mean(0) - around.mean(0)
    hue = (inside.max(-1) - inside.min(-1)).mean() - (around.max(-1) - around.min(-1)).mean()
    return np.array([*color, *edges, gray.std() - out.std(), far, hue])


@dataclass(frozen=True)
class Gate:
    """Reference and thresholds of one (product, defect).

    Attributes:
        null, real: mean looks without and with the defect.
        weight: of each number.
        change: (3,) mean color change of the defect.
        low, high: ratios that are accepted.
        controls: ratios of normal images under the same masks: mean, 95 % quantile, number.
        shots: ratios of the real shots.
    """

    null: tuple[float, ...]
    real: tuple[float, ...]
    weight: tuple[float, ...]
    change: tuple[float, ...]
    low: float
    high: float
    controls: dict[str, float]
    shots: tuple[float, ...]

    @classmethod
    def fit(
        cls,
        shots: Sequence[tuple[np.ndarray, np.ndarray]],
        normals: Sequence[tuple[np.ndarray, np.ndarray]],
    ) -> Gate:
        """Fit the gate.

        Args:
            shots: real defects, (image (H, W, 3) in [0, 1], mask).
            normals: normal images and masks laid on them.
        """
        real = np.array([looks(*one) for one in shots])
        null = np.array([looks(*one) for one in normals])
        mu0, mu1 = null.mean(0), real.mean(0)
        spread = null.var(0) + (real.var(0) if len(real) > 1 else 0.0) + 0.02**2
        weight = (mu1 - mu0) / spread
        if not np.any(weight):
            weight = np.ones_like(weight)
        change = mu1[:3] - mu0[:3]
        null_, real_, weight_, change_ = (tuple(map(float, v)) for v in (mu0, mu1, weight, change))
        gate = cls(null_, real_, weight_, change_, LOW, HIGH, {}, ())
        controls = np.array([gate.ratio_of(row) for row in null])
        ratios = np.array([gate.ratio_of(row) for row in real])
        limit = float(np.quantile(controls, _CONTROL_SHARE))
        high = float(max(HIGH, ratios.max() * 1.25))
        about = {"mean": float(controls.mean()), "q95": limit, "count": float(len(controls))}
        low = float(min(max(LOW, limit), 0.9))
        return replace(gate, low=low, high=high, controls=about, shots=tuple(map(float, ratios)))

    def ratio_of(self, found: np.ndarray) -> float:
        """Return the place of looks between normal (0) and defective (1)."""
        null, weight = np.array(self.null), np.array(self.weight)
        span = float(weight @ (np.array(self.real) - null))
        return float(weight @ (found - null)) / span if abs(span) > 1e-12 else 0.0

    def score(self, image: np.ndarray, normal: np.ndarray, mask: np.ndarray, raw: np.ndarray | None = None) -> Scores:
        """Measure a pair.

        Args:
            image, normal: (H, W, 3) in [0, 1].
            mask: (H, W) bool.
            raw: the image before it was pasted onto the normal one, for ``leak``; ``None`` where there is none.
        """
        change = ndimage.uniform_filter(image.astype(np.float64) - normal, (3, 3, 0))
        along = np.array(self.change)
        size = float(along @ along)
        if size > 0.03**2:
            filled = change @ along / size > 0.2
        else:  # a defect without a color of its own
            filled = np.abs(change).max(-1) > 0.04
        labels, count = ndimage.label(mask, np.ones((3, 3)))
        parts = [labels == i + 1 for i in range(count)]
        larger = [part for part in parts if part.sum() >= _PART * mask.sum()] or [mask]
        leak = 0.0
        if raw is not None:
            moved = np.abs(ndimage.uniform_filter(raw.astype(np.float64) - normal, (3, 3, 0))).max(-1) > 0.1
            leak = float((moved & ~ndimage.binary_dilation(mask, iterations=4)).mean())
        return Scores(
            self.ratio_of(looks(image, mask)),
            float(filled[mask].mean()),
            leak,
            min(float(filled[part].mean()) for part in larger),
        )

    def verdict(self, scores: Scores) -> str:
        """Return why a pair is rejected, ``""`` for an accepted one."""
        if scores.ratio < self.low:
            return f"too little of the defect: ratio {scores.ratio:.2f} is below {self.low:.2f}"
        if scores.ratio > self.high:
            return f"more than the real defects show: ratio {scores.ratio:.2f} is above {self.high:.2f}"
        if scores.fill < _MIN_FILL:
            return f"the mask is filled to {scores.fill:.0%} only; {_MIN_FILL:.0%} are needed"
        if scores.part_fill < _MIN_PART_FILL:
            return f"a part of the mask is filled to {scores.part_fill:.0%} only; {_MIN_PART_FILL:.0%} are needed"
        return ""

    def to_dict(self) -> dict[str, Any]:
        """Return the gate as JSON values."""
        return asdict(self)

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Gate:
        """Return the gate of :meth:`to_dict`."""
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        return Gate(**values)
