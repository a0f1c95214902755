"""Random queries, keys and values with the structure of images, for measurements without a model.

White noise is no test for a method that pools adjacent tokens: their mean carries nothing. Here q, k and v are random
fields that vary smoothly over a (T, H, W) grid, with independent noise per token. Queries and keys share a part, so
attention is high near the token and at similar positions; values share a part with the keys. Fields rotate slowly from
step to step, as activations do in a run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

Grid = tuple[int, int, int]
Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Structure:
    """The parameters of one kind of random attention.

    Attributes:
        smooth: standard deviation of the blur along every axis, in tokens: about half the size of similar regions.
        noise: variance of the independent part of every token, in [0, 1).
        shared: fraction of the variance of queries and values that comes from the field of the keys, in [0, 1].
        sharpness: standard deviation of the logits.
        rope: whether three-axis RoPE is applied to q and k.
        turn: rotation of the fields from one step to the next, in radians.
    """

    smooth: float = 2.0
    noise: float = 0.2
    shared: float = 0.5
    sharpness: float = 2.5
    rope: bool = False
    turn: float = 0.1


STRUCTURES: dict[str, Structure] = {
    "smooth": Structure(3.0, 0.1),
    "smooth-rope": Structure(3.0, 0.1, rope=True),
    "rough": Structure(1.5, 0.4),
    "rough-rope": Structure(1.5, 0.4, rope=True),
    "sharp": Structure(2.0, 0.2, sharpness=4.0),
    "sharp-rope": Structure(2.0, 0.2, sharpness=4.0, rope=True),
}
"""The six kinds that measurements use."""


def structured_qkv(
    structure: Structure, grid: Grid, heads: int, dim: int, steps: int = 1, seed: int = 0
) -> list[Tensors]:
    """Draw q, k, v of every step of a run.

    Args:
        structure: their parameters.
        grid: (T, H, W) tokens, row-major in the sequence.
        heads, dim: heads and head size of the layer; ``dim`` is even.
        steps: number of steps.
        seed: the same seed gives the same run.

    Returns:
        One (q, k, v) per step, each (1, S, H, D) fp32 with S = T H W.
    """
    generator = torch.Generator().manual_seed(seed)

    def fields() -> torch.Tensor:
        smooth = blurred(torch.randn(heads * dim, *grid, generator=generator), structure.smooth)
        own = torch.randn(heads * dim, *grid, generator=generator)
        mixed = math.sqrt(1.0 - structure.noise) * smooth + math.sqrt(structure.noise) * own
        return mixed.flatten(1).unflatten(0, (heads, dim)).permute(2, 0, 1)[None]

    now, then = ([fields() for _ in range(3)] for _ in range(2))
    common, rest = math.sqrt(structure.shared), math.sqrt(1.0 - structure.shared)
    found = []
    for step in range(steps):
        angle = structure.turn * step
        key, query, value = (math.cos(angle) * a + math.sin(angle) * b for a, b in zip(now, then, strict=True))
        q, k, v = common * key + rest * query, key, common * key + rest * value
        if structure.rope:
            q, k = rotated(q, grid), rotated(k, grid)
        sample = q[0, ::13].transpose(0, 1) @ k[0].permute(1, 2, 0)  # (H, S / 13, S)
        spread = sample.std() * dim**-0.5
        found.append((q * (structure.sharpness / spread), k, v))
    return found


def rotated(x: torch.Tensor, grid: Grid, base: float = 100.0) -> torch.Tensor:
    """Apply three-axis RoPE: a third of the channel pairs rotates with each coordinate.

    Args:
        x: (B, S, H, D) with S = T H W, row-major, D even.
        grid: (T, H, W).
        base: ratio of the fastest to the slowest frequency of an axis.
    """
    pairs = x.shape[-1] // 2
    places = torch.cartesian_prod(*(torch.arange(size, dtype=torch.float32) for size in grid)).reshape(-1, 3)
    angles = []
    for axis, part in enumerate(torch.arange(pairs).tensor_split(3)):
        speed = base ** (-torch.arange(len(part), dtype=torch.float32) / max(1, len(part)))
        angles.append(places[:, axis, None] * speed)
    angle = torch.cat(angles, 1)[None, :, None]
    turned = torch.view_as_complex(x.float().unflatten(-1, (pairs, 2)).contiguous()) * torch.polar(
        torch.ones_like(angle), angle
    )
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)


def blurred(x: torch.Tensor, width: float) -> torch.Tensor:
    """Blur (C, T, H, W) by ``width`` along every axis, and scale to unit variance."""
    for axis in (1, 2, 3):
        size = x.shape[axis]
        place = torch.arange(size, dtype=torch.float32)
        kernel = torch.exp(-0.5 * ((place[:, None] - place) / width) ** 2)
        x = torch.movedim(torch.movedim(x, axis, -1) @ kernel / kernel.square().sum(0).sqrt(), -1, axis)
    return x / x.std()
