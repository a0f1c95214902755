"""Masks of ReTtention: fixed by the grid and a density, the same for every call of a run."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from dit_attn.kernels import BlockLayout
from dit_attn.kernels.layouts.block_layout import ceil_div
from dit_attn.kernels.layouts.cache import cached
from dit_attn.kernels.layouts.element_masks import BitMask
from dit_attn.kernels.layouts.patterns import from_rule
from dit_attn.kernels.selection.budget import blocks_of_density
from dit_attn.processors.core.token_permute import token_permutation
from dit_attn.processors.core.tokens import Tokens
from dit_attn.processors.methods.head_budget import HeadBudget

MASKS = {"band": "columns", "window": "hilbert", "selected": "hilbert"}
"""Masks, and the order in which their tiles are fullest."""


@cached
def band_layout(tokens: Tokens, density: HeadBudget, q_block: int, kv_block: int, device: torch.device) -> BlockLayout:
    """Return the paper's mask in the order ``columns``; cached for the next call with the same arguments.

    A visual token attends to the tokens of its span that are at most half a band away in the row-major order of a
    frame, in every frame, and to all tokens of other spans. With all frames of a position side by side this is one run
    of keys.

    Args:
        tokens: the resolved sequence.
        density: fraction of a frame's tokens in the band, of all heads or of each; 1 is every token.
        q_block, kv_block: tokens per block.
        device: device of the layout.
    """
    if isinstance(density, tuple):
        return stack_heads([band_layout(tokens, each, q_block, kv_block, device) for each in density])
    order = token_permutation(tokens, MASKS["band"], None, torch.device("cpu"))
    span, position, half = [], [], []
    for index, part in enumerate(order.parts):
        _, height, width = part.grid
        _, h, w = part.coordinates().unbind(-1)
        position.append(h * width + w)
        span.append(torch.full((len(part),), index))
        cells = height * width
        half.append(torch.full((len(part),), cells if density >= 1.0 else math.floor(cells * density) // 2))
    rest = torch.full((tokens.seq_len - order.visual,), -1)
    owner, at, reach = torch.cat([*span, rest]), torch.cat([*position, rest]), torch.cat([*half, rest])

    def rule(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return (owner[q] != owner[k]) | ((at[q] - at[k]).abs() <= reach[q])

    return from_rule(rule, order.visual, tokens.seq_len, q_block=q_block, kv_block=kv_block).to(device)


@cached
def window_layout(
    tokens: Tokens,
    density: HeadBudget,
    window: tuple[int, int, int] | None,
    q_block: int,
    kv_block: int,
    device: torch.device,
) -> BlockLayout:
    """Return the layout of every query block with the key blocks nearest on the grid; cached for the next call.

    Blocks along the curve are compact, so this is a box around the query block that is shifted inward at the borders
    and consists of full tiles: the computed density is the requested one.

    Args:
        tokens: the resolved sequence.
        density: fraction of a span's blocks that is attended to, of all heads or of each; blocks of other spans and of
            text always are.
        window: (t, h, w), the proportions of the box; ``None`` for those of the grid.
        q_block, kv_block: tokens per block.
        device: device of the layout.
    """
    if isinstance(density, tuple):
        return stack_heads([window_layout(tokens, each, window, q_block, kv_block, device) for each in density])
    order = token_permutation(tokens, MASKS["window"], None, torch.device("cpu"))
    nq, nk = ceil_div(order.visual, q_block), ceil_div(tokens.seq_len, kv_block)
    selected = torch.zeros(nq, nk, dtype=torch.bool)
    start = 0
    for part in order.parts:
        stop = start + len(part)
        size = torch.tensor(window or part.grid, dtype=torch.float64)
        at = part.coordinates() / size
        q, first_q = _centers(at, start, q_block)
        k, first_k = _centers(at, start, kv_block)
        far = torch.cdist(q, k, p=math.inf) + 1e-3 * torch.cdist(q, k)  # box first, ties by the straight distance
        nearest = far.topk(blocks_of_density(density, len(k)), largest=False).indices + first_k
        rows = torch.arange(len(q))[:, None] + first_q
        selected[rows, nearest] = True
        others = torch.ones(nk, dtype=torch.bool)  # blocks with tokens outside this span
        others[ceil_div(start, kv_block) : stop // kv_block] = False
        if stop == tokens.seq_len:
            others[stop // kv_block :] = False
        selected[first_q : first_q + len(q)] |= others
        start = stop
    return BlockLayout.from_mask(selected[None, None], order.visual, tokens.seq_len, q_block, kv_block).to(device)


def _centers(at: torch.Tensor, start: int, block: int) -> tuple[torch.Tensor, int]:
    """(n, 3) mean position of every block with tokens of a span, and the index of the first block.

    Args:
        at: (tokens, 3) positions of the span's tokens.
        start: index of the first of them in the sequence.
        block: tokens per block.
    """
    owner = (torch.arange(len(at)) + start) // block
    first = int(owner[0])
    count = torch.bincount(owner - first).to(at.dtype)
    total = torch.zeros(len(count), 3, dtype=at.dtype).index_add_(0, owner - first, at)
    return total / count[:, None], first


def stack_heads(layouts: Sequence[BlockLayout]) -> BlockLayout:
    """Return layouts of one size that all heads share, (1, 1, ...), as the layout of that many heads, (1, H, ...)."""
    first = layouts[0]
    sizes = (first.q_len, first.kv_len, first.q_block, first.kv_block)
    full = torch.cat([layout.full_mask() for layout in layouts], 1)
    bits = [layout.elements.bits for layout in layouts if isinstance(layout.elements, BitMask)]
    if not bits:
        return BlockLayout.from_mask(full, *sizes)
    entries = max(table.shape[3] for table in bits)
    empty = bits[0].new_zeros(1, 1, *bits[0].shape[2:3], entries, *bits[0].shape[4:])
    padded = []
    for layout in layouts:
        table = empty
        if isinstance(layout.elements, BitMask):
            table = empty.clone()
            table[:, :, :, : layout.elements.bits.shape[3]] = layout.elements.bits
        padded.append(table)
    partial = torch.cat([layout.block_mask() for layout in layouts], 1) & ~full
    return BlockLayout.from_parts(full, partial, BitMask(torch.cat(padded, 1)), *sizes)
