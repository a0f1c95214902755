"""Inputs of kernel benchmarks: three kinds of queries, keys, values and layouts.

Random blocks in equal numbers show the peak rate of a kernel and the worst use of the cache. Fields that vary slowly
over a grid, with a different temperature in every head, give adjacent queries common keys and rows different counts, as
trained models do. Recorded calls come from trained models.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dit_attn.errors import DitAttnError
from dit_attn.kernels.layouts.block_layout import BlockLayout
from dit_attn.kernels.selection.select import block_probabilities, block_scores, select_blocks

KINDS = ("random", "structured")
WAVES = 64  # plane waves of a structured field


@dataclass(frozen=True)
class Shape:
    """Sizes of one attention call: batch B, tokens S, heads H, head size D, tokens per block."""

    batch: int
    seq: int
    heads: int
    dim: int
    block: int


@dataclass(frozen=True)
class Inputs:
    """One attention call, and a layout for each density.

    Attributes:
        kind: a name of ``KINDS``, or "captured".
        q, k, v: (B, S, H, D).
        layouts: one per density.
        block: tokens per block.
    """

    kind: str
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    layouts: list[BlockLayout]
    block: int


def random_inputs(
    shape: Shape, dtype: torch.dtype, device: torch.device, densities: Sequence[float], sharpness: float = 1.0
) -> Inputs:
    """Draw white noise, with random blocks in equal numbers per row.

    Args:
        shape: sizes.
        dtype, device: of q, k, v.
        densities: fractions of key blocks per query block, one layout each.
        sharpness: standard deviation of the logits; errors grow with it.
    """
    torch.manual_seed(0)
    size = (shape.batch, shape.seq, shape.heads, shape.dim)
    q, k, v = (torch.randn(size, device=device, dtype=dtype) for _ in range(3))
    blocks = -(-shape.seq // shape.block)
    scores = torch.randn(shape.batch, shape.heads, blocks, blocks, device=device)
    sizes: dict[str, Any] = {"q_len": shape.seq, "kv_len": shape.seq, "q_block": shape.block, "kv_block": shape.block}
    layouts = [select_blocks(scores, density=density, **sizes) for density in densities]
    return Inputs("random", q * sharpness, k, v, layouts, shape.block)


def structured_inputs(
    shape: Shape, dtype: torch.dtype, device: torch.device, densities: Sequence[float], sharpness: float = 1.0
) -> Inputs:
    """Draw smooth fields over a grid that queries and keys share, with noise; heads from flat to sharp.

    Arguments are those of :func:`random_inputs`; ``sharpness`` is that of the middle head.
    """
    torch.manual_seed(0)
    place = _places(shape.seq, device)
    q, k, v = (torch.empty(shape.batch, shape.seq, shape.heads, shape.dim, device=device, dtype=dtype) for _ in "qkv")
    for h in range(shape.heads):
        field = _field(place, shape.dim)
        heat = sharpness * 4.0 ** (h / max(1, shape.heads - 1) - 0.5)
        for x, factor in ((q, heat), (k, 1.0), (v, 1.0)):
            noise = torch.randn(shape.batch, shape.seq, shape.dim, device=device)
            x[:, :, h] = (factor * (0.8 * field + 0.6 * noise)).to(dtype)
    return Inputs("structured", q, k, v, _spread_layouts(q, k, shape.block, densities), shape.block)


def captured_inputs(
    path: Path, dtype: torch.dtype, device: torch.device, densities: Sequence[float], block: int
) -> Inputs:
    """Load a recorded call: a .safetensors file with q, k and v (B, S, H, D), as ``dit-attn bench capture`` writes it.

    Args:
        path: the file.
        dtype, device: to convert q, k, v to.
        densities: fractions of key blocks per query block, one layout each.
        block: tokens per block.

    Raises:
        DitAttnError: the file is missing, or has other contents.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise DitAttnError(f"cannot read {path}: {error}; give a file that 'dit-attn bench capture' wrote") from error
    wrong = [name for name in "qkv" if name not in tensors or tensors[name].ndim != 4]
    if wrong:
        raise DitAttnError(
            f"{path} has no (B, S, H, D) tensor {wrong[0]!r}; give a file that 'dit-attn bench capture' wrote"
        )
    q, k, v = (tensors[name].to(device, dtype) for name in "qkv")
    if not q.shape == k.shape == v.shape:
        shapes = ", ".join(f"{name} {tuple(tensors[name].shape)}" for name in "qkv")
        raise DitAttnError(f"{path} has no self-attention with equal heads: {shapes}; capture another layer")
    return Inputs("captured", q, k, v, _spread_layouts(q, k, block, densities), block)


def counts_of(layout: BlockLayout) -> dict[str, float]:
    """Return the key blocks per row: mean, 95th percentile, largest. Synchronises with an accelerator."""
    counts = layout.kv_num_blocks.flatten().float().sort().values
    rank = min(len(counts) - 1, math.ceil(0.95 * len(counts)) - 1)
    return {"mean": float(counts.mean()), "p95": float(counts[rank]), "max": float(counts[-1])}


def _spread_layouts(q: torch.Tensor, k: torch.Tensor, block: int, densities: Sequence[float]) -> list[BlockLayout]:
    """Layouts of the blocks of largest pooled probability over all heads and rows: rows get different counts."""
    mass = block_probabilities(block_scores(q, k, block, block))
    best = torch.zeros_like(mass, dtype=torch.bool).scatter_(-1, mass.argmax(-1, keepdim=True), True)
    ranked = mass.flatten().sort(descending=True).values
    layouts = []
    for density in densities:
        least = ranked[max(0, min(len(ranked), round(density * len(ranked))) - 1)]
        layouts.append(BlockLayout.from_mask((mass >= least) | best, q.shape[1], k.shape[1], block, block))
    return layouts


def _places(seq: int, device: torch.device) -> torch.Tensor:
    """(S, 3), positions on a grid of about four times as many rows and columns as frames, in units of its side."""
    side = max(1, round((4.0 * seq) ** (1 / 3)))
    cell = torch.arange(seq, device=device)
    return torch.stack([cell // (side * side), cell // side % side, cell % side], 1) / side


def _field(place: torch.Tensor, dim: int) -> torch.Tensor:
    """(S, D) of unit variance: plane waves of up to a few periods across the grid, mixed at random."""
    wave = 2.0 * math.pi * torch.randn(3, WAVES, device=place.device)
    phase = 2.0 * math.pi * torch.rand(WAVES, device=place.device)
    mix = torch.randn(WAVES, dim, device=place.device) * (2.0 / WAVES) ** 0.5
    return torch.cos(place @ wave + phase) @ mix
