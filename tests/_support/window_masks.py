"""Which keys the windows of a grid hold, by their definition: one comparison per axis."""

from __future__ import annotations

import torch

from dit_attn.processors.core.tokens import Tokens


def window_mask(grid: tuple[int, ...], window: tuple[int, ...], clip: bool = False) -> torch.Tensor:
    """(S, S) bool over a row-major grid; windows move inward at a border, or are cut off there."""
    place = torch.cartesian_prod(*(torch.arange(n) for n in grid))
    seen = torch.ones(len(place), len(place), dtype=torch.bool)
    for axis, (n, k) in enumerate(zip(grid, window, strict=True)):
        low = place[:, axis] - k // 2
        low = low if clip else low.clamp(0, n - k)
        seen &= (place[:, axis] >= low[:, None]) & (place[:, axis] < low[:, None] + k)
    return seen


def window_bias(tokens: Tokens, window: tuple[int, ...], clip: bool = False) -> torch.Tensor:
    """(1, 1, S, S) logit bias, 0 or ``-inf``: visual rows see their window and all text, others everything."""
    (span,) = tokens.visual
    assert span.grid is not None
    allowed = torch.ones(tokens.seq_len, tokens.seq_len, dtype=torch.bool)
    allowed[span.start : span.stop, span.start : span.stop] = window_mask(span.grid, window, clip)
    return torch.zeros(allowed.shape, dtype=torch.float64).masked_fill(~allowed, float("-inf"))[None, None]
