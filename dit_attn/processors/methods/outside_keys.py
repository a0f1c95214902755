"""What stands for the keys outside of a window: their means, or anchors that rotate.

Anchors are keys of the sequence, with positions of their own: one of every few tokens, and another one at every step
and in every head, as the global anchors of LVSA (arXiv 2605.31057) do in time. After as many steps as an anchor stands
for tokens, every head has attended to every key. Each counts as all the tokens that it stands for, so that sums over
the keys outside are estimated without bias.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from dit_attn.kernels import Compensation, pooled_compensation, sampled_compensation
from dit_attn.processors.core.token_permute import PermutedTokens

WORDS = {"pooled": "pooled keys", "anchors": "anchors"}


def tokens_per_key(most: int, block: int) -> int:
    """Return the largest number of tokens, at most ``most``, that divides a block."""
    return next(n for n in range(min(most, block), 0, -1) if block % n == 0)


def compensation(kind: str, rows: PermutedTokens, tokens: int, step: int, bias: float = 0.0) -> Compensation:
    """Return what stands for the keys that a row does not attend to.

    Args:
        kind: ``pooled`` or ``anchors``.
        rows: the call in tile order.
        tokens: keys that each one stands for.
        step: of the run; anchors rotate with it.
        bias: added to its logits.
    """
    if kind == "pooled":
        found = pooled_compensation(rows.k, rows.v, tokens, key_mask=rows.key_mask)
    else:
        places = anchor_places(tokens, step, rows.k.shape[2], rows.k.device)
        found = sampled_compensation(rows.k, rows.v, tokens, places, key_mask=rows.key_mask)
    return replace(found, log_weight=found.log_weight + bias) if bias else found


def anchor_places(tokens: int, step: int, heads: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Return (heads,) int64, which of ``tokens`` neighbors is the anchor: each once in as many steps, far apart.

    A step, and a head, is worth about 0.618 of the way round (the golden ratio), which spreads any few of them evenly.
    """
    stride = next(n for n in range(max(1, round(0.618 * tokens)), tokens + 1) if math.gcd(n, tokens) == 1)
    return (step + torch.arange(heads, device=device)) * stride % tokens
