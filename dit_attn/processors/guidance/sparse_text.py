"""Attention to the text by alpha-entmax, whose small weights are exactly 0, and the step from dense to sparse.

With alpha = 1.5 the weights of logits z are ``max(z / 2 - tau, 0) ** 2`` and with alpha = 2 ``max(z - tau, 0)``, tau
such that they add up to 1 (Peters et al., arXiv 1905.05702). Both are exact: tau follows from the sorted logits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from dit_attn.kernels.terms import BARRED, LogitBias
from dit_attn.processors.guidance.perturbation import wide

ALPHAS = (1.5, 2.0)
AT_ONCE = 2**24
"""Logits that are built at a time: the matrix of the image rows and the text is never whole."""
_NOTHING = -1e4  # of a key that is not there, below the largest logit of its row


@dataclass(frozen=True)
class TextAttention:
    """What some rows get from the text.

    Attributes:
        sparse: (B, n, H, Dv) fp32 (fp64 for fp64 input), by entmax.
        dense: the same by softmax over the text alone.
        lse: (B, n, H), log-sum-exp of the logits of the text; ``-inf`` where the row attends to none of it.
    """

    sparse: torch.Tensor
    dense: torch.Tensor
    lse: torch.Tensor


def entmax(logits: torch.Tensor, alpha: float = 1.5) -> torch.Tensor:
    """Return the alpha-entmax of the last axis.

    Args:
        logits: (..., n), fp32 or fp64; ``-inf`` for keys that are not there.
        alpha: one of :data:`ALPHAS`; 1 would be softmax, 2 is sparsemax.

    Returns:
        (..., n) weights that add up to 1, most of them 0; all 0 in a row without keys.
    """
    largest = logits.amax(-1, keepdim=True)
    there = largest > -math.inf
    z = ((logits - largest) * (alpha - 1.0)).masked_fill(~there, 0.0).clamp(min=_NOTHING)
    ordered = z.sort(-1, descending=True).values
    count = torch.arange(1, z.shape[-1] + 1, device=z.device, dtype=z.dtype)
    mean = ordered.cumsum(-1) / count
    if alpha == 2.0:
        tau = mean - 1.0 / count
    else:
        spread = count * (ordered.square().cumsum(-1) / count - mean.square())
        tau = mean - ((1.0 - spread) / count).clamp(min=0.0).sqrt()
    support = (tau < ordered).sum(-1, keepdim=True).clamp(min=1)
    weights = (z - tau.gather(-1, support - 1)).clamp(min=0.0)
    return (weights if alpha == 2.0 else weights.square()) * there


def attend_to_text(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    added: torch.Tensor | None = None,
    bias: LogitBias | None = None,
    alpha: float = 1.5,
) -> TextAttention:
    """Compute sparse and dense attention of image rows to the keys of the text, some rows at a time.

    Args:
        q: (B, n, H, D) rows.
        k, v: (B, m, Hk, D) keys and values of the text; ``H % Hk == 0``.
        scale: softmax scale.
        added: (B, 1|H, m), added to the logits, ``-inf`` for keys that are not there.
        bias: low-rank bias of these rows and keys.
        alpha: one of :data:`ALPHAS`.
    """
    group = q.shape[2] // k.shape[2]
    keys, values = (wide(x).repeat_interleave(group, 2) for x in (k, v))
    chunk = max(1, AT_ONCE // max(1, q.shape[0] * q.shape[2] * k.shape[1]))
    parts = []
    for low in range(0, q.shape[1], chunk):
        rows = slice(low, low + chunk)
        logits = torch.einsum("bqhd,bkhd->bhqk", wide(q[:, rows]), keys) * scale
        if added is not None:
            logits = logits + added[:, :, None].to(logits.dtype)
        if bias is not None:
            product = bias.q[:, :, rows] @ bias.k.mT
            logits = logits + product.masked_fill(product <= BARRED, -math.inf)
        lse = logits.logsumexp(-1)
        dense = (logits - lse[..., None]).exp().masked_fill(lse[..., None] == -math.inf, 0.0)
        weighted = [torch.einsum("bhqk,bkhd->bqhd", weights, values) for weights in (entmax(logits, alpha), dense)]
        parts.append((*weighted, lse.transpose(1, 2)))
    return TextAttention(*(torch.cat(part, 1) for part in zip(*parts)))


def extrapolated(
    sparse: torch.Tensor, dense: torch.Tensor, scale: float, limit: float, orthogonal: float
) -> torch.Tensor:
    """Go on from the sparse result in the direction in which it differs from the dense one.

    Args:
        sparse, dense: (..., D) results of one head for one row.
        scale: length of the step, in differences.
        limit: largest norm of the difference that is extrapolated.
        orthogonal: factor of the part of the difference that is orthogonal to the sparse result.

    Returns:
        (..., D).
    """
    difference = sparse - dense
    tiny = torch.finfo(sparse.dtype).tiny
    along = (difference * sparse).sum(-1, keepdim=True) / sparse.square().sum(-1, keepdim=True).clamp(min=tiny) * sparse
    step = along + orthogonal * (difference - along)
    return sparse + scale * step * (limit / step.norm(dim=-1, keepdim=True).clamp(min=tiny)).clamp(max=1.0)
