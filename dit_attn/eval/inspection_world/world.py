"""Pieces of the inspection world: a product, with a defect or without, and what is known of it exactly.

    piece = Piece("metal", "scratch", seed=0)
    caption(piece)                # 'metal with a scratch'
    drawn = draw(piece, 64)       # image, its normal twin, exact mask, foreground
    drawn.image[~drawn.mask] == drawn.normal[~drawn.mask]   # everywhere

Everything follows from the words and the seed. The mask holds the pixels that the defect changes by more than
``CHANGED`` in the noise-free drawing; elsewhere the defective image and its normal twin are equal to the last bit.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dit_attn.eval.inspection_world.defects import DEFECTS
from dit_attn.eval.inspection_world.products import PRODUCTS
from dit_attn.eval.inspection_world.real_textures import TEXTURES, texture

if TYPE_CHECKING:
    import torch

CHANGED = 4 / 255  # a pixel belongs to the mask when a channel changes by more
NOISE = 2 / 255  # standard deviation of the sensor noise
HELD_OUT_PAIRS = (("weave", "hole"), ("granite", "contamination"), ("nut", "scratch"))
"""(product, defect) pairs that tiny-inspect was never trained on."""
FIRST_HELD_OUT_SEED = 2**40
"""Training draws seeds below this number, evaluation from it on."""


@dataclass(frozen=True)
class Piece:
    """One piece.

    Args:
        product: one of `PRODUCTS`, or of `real_textures.TEXTURES` (real texture, drawn defect).
        defect: one of `DEFECTS`, or "" for a normal piece.
        seed: of everything that is random about it.
    """

    product: str
    defect: str
    seed: int


@dataclass(frozen=True)
class Drawing:
    """What is known of a piece.

    Attributes:
        image: (H, W, 3) float32 in [0, 1].
        normal: the same piece without the defect.
        mask: (H, W) bool, the pixels that the defect changes; empty for a normal piece.
        foreground: (H, W) bool, where a defect of the product may lie.
    """

    image: np.ndarray
    normal: np.ndarray
    mask: np.ndarray
    foreground: np.ndarray


def caption(piece: Piece) -> str:
    """Write the words of `piece`: "metal with a scratch", or "normal metal"."""
    return words(piece.product, piece.defect)


def words(product: str, defect: str) -> str:
    """Write a product and a defect, "" for none, as a caption."""
    article = "" if defect == "contamination" else "a "
    return f"{product} with {article}{defect}" if defect else f"normal {product}"


def vocabulary() -> list[str]:
    """List every word that a caption can contain, sorted."""
    texts = [words(product, defect) for product in (*PRODUCTS, *TEXTURES) for defect in ("", *DEFECTS)]
    return sorted({word for text in texts for word in text.split()})


def pairs(*, held_out: bool = False) -> list[tuple[str, str]]:
    """List the (product, defect) pairs of training, or those never trained on."""
    if held_out:
        return list(HELD_OUT_PAIRS)
    return [(p, d) for p in PRODUCTS for d in DEFECTS if (p, d) not in HELD_OUT_PAIRS]


def sample_pieces(count: int, generator: torch.Generator, defective: float) -> list[Piece]:
    """Draw `count` random training pieces, a share of `defective` of them with a defect."""
    import torch

    seeds = torch.randint(FIRST_HELD_OUT_SEED, (count,), generator=generator).tolist()
    chosen = torch.randint(len(pairs()), (count,), generator=generator).tolist()
    normal = (torch.rand(count, generator=generator) >= defective).tolist()
    products = torch.randint(len(PRODUCTS), (count,), generator=generator).tolist()
    names = tuple(PRODUCTS)
    found = [(names[p], "") if n else pairs()[c] for n, p, c in zip(normal, products, chosen)]
    return [Piece(product, defect, seed) for (product, defect), seed in zip(found, seeds)]


def draw(piece: Piece, size: int) -> Drawing:
    """Draw `piece` at `size` x `size` pixels.

    Raises:
        DitAttnError: a real texture, and scikit-image is not installed.
    """
    surface, foreground = _surface(piece, size)
    noise = NOISE * _rng(piece, "noise").standard_normal((size, size, 3))
    normal = np.clip(surface + noise, 0, 1).astype(np.float32)
    if not piece.defect:
        return Drawing(normal, normal, np.zeros((size, size), bool), foreground)
    image, mask = normal, np.zeros((size, size), bool)
    for attempt in range(20):  # a defect that falls off the product is placed again
        paint, alpha = DEFECTS[piece.defect](_rng(piece, f"defect {attempt}"), surface, foreground)
        alpha = np.where(foreground, alpha, 0.0)[..., None]
        painted = surface + alpha * (paint - surface)
        mask = (np.abs(painted - surface) > CHANGED).any(-1)
        if mask.mean() >= 0.006:
            break
    image = np.where(mask[..., None], np.clip(painted + noise, 0, 1).astype(np.float32), normal)
    return Drawing(image, normal, mask, foreground)


def _surface(piece: Piece, size: int) -> tuple[np.ndarray, np.ndarray]:
    if piece.product in TEXTURES:
        return texture(piece.product, piece.seed, size), np.ones((size, size), bool)
    return PRODUCTS[piece.product](_rng(piece, "surface"), size)


def _rng(piece: Piece, part: str) -> np.random.Generator:
    """Random numbers of one part of a piece; the surface does not depend on the defect."""
    name = f"{piece.product} {piece.seed} {part} {'' if part == 'surface' else piece.defect}"
    return np.random.default_rng(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big"))
