"""The arms: where the pairs come from that a segmenter trains on beside the real shots.

- ``none``: nothing; the shots alone.
- ``cutpaste``: patches of normal images, moved (Li et al., CutPaste, 2021).
- ``crop-paste``: the defects of the real shots, cut out along their masks, turned and pasted elsewhere.
- ``perlin``: textures of other products inside thresholded Perlin noise (Zavrtanik et al., DRAEM, 2021).
- ``generated``: what ``anomaly generate`` makes of a concept learned from the same shots.
- ``reweighted``: the same with adaptive attention re-weighting, where the method is there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy import ndimage

from dit_attn.errors import DitAttnError, unknown
from dit_attn.pipelines.anomaly.masks import boxed, find_place, foreground

Sample = tuple[np.ndarray, np.ndarray]
"""Image (H, W, 3) uint8 and mask (H, W) bool."""
NONE = "none"
GENERATED: dict[str, tuple[str, ...]] = {"generated": (), "reweighted": ("reweighting",)}
"""Arms that a diffusion model paints, with the methods that they enable."""
_TRIES = 40


@dataclass(frozen=True)
class Materials:
    """What defects are made of.

    Attributes:
        normals: images (H, W, 3) uint8.
        shots: real defects.
        textures: images of other products; the normal ones, altered, where there are none.
    """

    normals: Sequence[np.ndarray]
    shots: Sequence[Sample]
    textures: Sequence[np.ndarray] = field(default_factory=tuple)

    def normal(self, rng: np.random.Generator) -> np.ndarray:
        """Draw a normal image."""
        return self.normals[int(rng.integers(len(self.normals)))]


def cut_paste(materials: Materials, rng: np.random.Generator) -> Sample:
    """Move a patch, or a thin turned scar, of a normal image onto the product, with a jitter of its colors."""
    image, source = materials.normal(rng), materials.normal(rng)
    if rng.uniform() < 0.5:  # CutPaste: 2 to 15 % of the area, sides up to 1 : 3.3
        area, aspect = rng.uniform(0.02, 0.15) * image.shape[0] * image.shape[1], np.exp(rng.uniform(-1.2, 1.2))
        shape = np.ones([max(2, round(side)) for side in (np.sqrt(area * aspect), np.sqrt(area / aspect))], bool)
    else:  # a scar of 2 to 16 by 10 to 25 pixels of 256
        unit = min(image.shape[:2]) / 256
        size = [max(1, round(rng.uniform(low, high) * unit)) for low, high in ((2, 16), (10, 25))]
        shape = ndimage.rotate(np.pad(np.ones(size), 1), rng.uniform(-45, 45), order=1) > 0.5
    shape = shape[: image.shape[0], : image.shape[1]]
    height, width = (min(a, b) for a, b in zip(shape.shape, source.shape))
    shape = shape[:height, :width]
    top, left = (int(rng.integers(total - own + 1)) for total, own in zip(source.shape, shape.shape))
    patch = source[top : top + height, left : left + width] * (1 + rng.uniform(-0.1, 0.1, 3))
    return _pasted(image, np.clip(patch, 0, 255), shape, rng)


def crop_paste(materials: Materials, rng: np.random.Generator) -> Sample:
    """Paste the defect of a real shot, mirrored, turned and scaled, onto the product of a normal image."""
    for _ in range(_TRIES):
        pixels, mask = materials.shots[int(rng.integers(len(materials.shots)))]
        rows, columns = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
        box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
        part, shape = pixels[box].astype(np.float64), mask[box].astype(np.float64)
        quarter, mirrored = int(rng.integers(4)), rng.uniform() < 0.5
        part, shape = (np.rot90(one[:, ::-1] if mirrored else one, quarter) for one in (part, shape))
        turn, scale = rng.uniform(-25, 25), rng.uniform(0.85, 1.2)
        # Beyond the defect its nearest pixel is repeated, so that turning mixes in nothing of the old background.
        nearest = ndimage.distance_transform_edt(shape < 0.5, return_distances=False, return_indices=True)
        part = part[tuple(nearest)]
        part = ndimage.zoom(ndimage.rotate(part, turn, order=1, mode="nearest"), (scale, scale, 1), order=1)
        shape = ndimage.zoom(ndimage.rotate(shape, turn, order=1), scale, order=1) > 0.5
        image = materials.normal(rng)
        try:
            return _pasted(image, part, shape, rng)
        except DitAttnError:
            continue
    raise DitAttnError("the defects of the shots fit on no normal image; give larger images")


def perlin(materials: Materials, rng: np.random.Generator) -> Sample:
    """Blend an altered texture into the product where Perlin noise is high."""
    image = materials.normal(rng)
    region = foreground(image)
    mask = np.zeros(region.shape, bool)
    for _ in range(_TRIES):
        periods = [2 ** int(power) for power in rng.integers(0, 7, 2)]
        noise = perlin_noise(image.shape[:2], periods, rng)
        noise = ndimage.rotate(noise, rng.uniform(-90, 90), reshape=False, order=1)
        mask = (noise > 0.5) & region
        if 0 < mask.mean() < 0.9 and mask.sum() >= 4:
            break
    else:
        mask = region & (np.indices(region.shape).sum(0) % 8 < 4)
    texture = _altered(materials, rng, image.shape[:2])
    beta = rng.uniform(0.1, 1.0)
    out = image.astype(np.float64)
    out[mask] = (1 - beta) * out[mask] + beta * texture[mask]
    return np.clip(np.round(out), 0, 255).astype(np.uint8), mask


DRAWN: dict[str, Callable[[Materials, np.random.Generator], Sample]] = {
    "cutpaste": cut_paste,
    "crop-paste": crop_paste,
    "perlin": perlin,
}
ARMS = (NONE, *DRAWN, *GENERATED)


def check_arms(names: Sequence[str], methods: Sequence[str]) -> tuple[str, ...]:
    """Check names of arms; no name stands for all that there are.

    Args:
        names: of the arms.
        methods: slugs of the methods that are there.

    Returns:
        The arms in the order of ``ARMS``, with ``"none"``, which the others are measured against.

    Raises:
        DitAttnError: an unknown arm, or the method of one is not there.
    """
    there = [arm for arm in ARMS if set(GENERATED.get(arm, ())) <= set(methods)]
    for name in names:
        if name not in ARMS:
            raise unknown("arm", name, ARMS)
        if name not in there:
            missing = GENERATED[name][0]
            raise DitAttnError(f"the arm {name!r} needs the method {missing!r}, which is not there; leave it out")
    return tuple(arm for arm in there if not names or arm in names or arm == NONE)


def make_drawn(arm: str, materials: Materials, count: int, seed: Sequence[int]) -> list[Sample]:
    """Make pairs of an arm in ``DRAWN``; pair ``i`` depends on ``seed`` and ``i`` alone."""
    return [DRAWN[arm](materials, np.random.default_rng((*seed, i))) for i in range(count)]


def perlin_noise(size: Sequence[int], periods: Sequence[int], rng: np.random.Generator) -> np.ndarray:
    """Draw Perlin noise (Perlin, An Image Synthesizer, 1985): (H, W), about -1 to 1.

    Args:
        size: height and width.
        periods: cells along each.
        rng: random numbers.
    """
    angles = rng.uniform(0, 2 * np.pi, (int(periods[0]) + 1, int(periods[1]) + 1))
    slopes = np.stack([np.sin(angles), np.cos(angles)], -1)
    y, x = ((np.arange(n) + 0.5) / n * p for n, p in zip(size, periods))
    row, column = y.astype(int)[:, None], x.astype(int)[None, :]
    fy, fx = y[:, None] - row, x[None, :] - column
    corners = [
        slopes[row + dy, column + dx, 0] * (fy - dy) + slopes[row + dy, column + dx, 1] * (fx - dx)
        for dy in (0, 1)
        for dx in (0, 1)
    ]
    ty, tx = (t * t * t * (t * (6 * t - 15) + 10) for t in (fy, fx))
    upper, lower = (a + tx * (b - a) for a, b in (corners[:2], corners[2:]))
    return np.sqrt(2) * (upper + ty * (lower - upper))


def _pasted(image: np.ndarray, part: np.ndarray, shape: np.ndarray, rng: np.random.Generator) -> Sample:
    """Paste the pixels of ``part`` that ``shape`` marks at a random place of the product."""
    if not shape.any():
        shape = np.ones_like(shape)
    height, width = (min(a, b) for a, b in zip(part.shape, shape.shape))
    part, shape = part[:height, :width], shape[:height, :width]
    top, left = find_place(shape, foreground(image), rng)
    box = slice(top, top + height), slice(left, left + width)
    out, mask = image.copy(), np.zeros(image.shape[:2], bool)
    mask[box] = shape
    out[mask] = np.clip(np.round(part[shape]), 0, 255).astype(np.uint8)
    return out, mask


def _altered(materials: Materials, rng: np.random.Generator, size: Sequence[int]) -> np.ndarray:
    """A texture (H, W, 3), three times altered at random as DRAEM does."""
    from PIL import Image, ImageEnhance, ImageOps

    sources = materials.textures or materials.normals
    picture = Image.fromarray(sources[int(rng.integers(len(sources)))]).resize((size[1], size[0]))
    changes: list[Callable[[Image.Image], Image.Image]] = [
        ImageOps.autocontrast,
        ImageOps.equalize,
        ImageOps.invert,
        lambda one: ImageOps.solarize(one, int(rng.integers(32, 128))),
        lambda one: ImageOps.posterize(one, int(rng.integers(4, 7))),
        lambda one: ImageEnhance.Brightness(one).enhance(float(rng.uniform(0.7, 1.3))),
        lambda one: ImageEnhance.Color(one).enhance(float(rng.uniform(0.0, 2.0))),
        lambda one: one.rotate(float(rng.uniform(-45, 45))),
    ]
    for index in rng.permutation(len(changes))[:3]:
        picture = changes[index](picture)
    return np.asarray(picture).astype(np.float64)


def shapes_of(shots: Sequence[Sample]) -> list[np.ndarray]:
    """Return the masks of real shots, cut to their boxes."""
    return [boxed(mask) for _, mask in shots]
