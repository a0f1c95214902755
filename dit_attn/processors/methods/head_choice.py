"""Choose heads by token without training: by energies that a ridge regression predicts, or by norms of queries.

The first is ours: of a head's contribution to the layer's output, ``log |z_h W_O,h|^2`` is predicted from the layer's
input, linearly. The second is the rule of MoH-LLaMA (arXiv 2410.11842): heads with long queries stay. A normalization
of the queries makes their norms nearly the same for all tokens, so that they must be taken before it.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F

from dit_attn.processors.core.call import AttentionCall

ROUTES = ("learned", "calibrated", "query")
FILLS = ("zero", "mean")


@dataclass(frozen=True)
class TokenGroups:
    """Consecutive tokens that choose their heads together.

    Attributes:
        size: tokens of a group.
        edges: tokens that a group does not reach across, ascending: where the picture begins and ends.
    """

    size: int
    edges: tuple[int, ...] = ()

    def mean(self, x: torch.Tensor) -> torch.Tensor:
        """Return (B, S, n) with the mean of its group at every token."""
        bounds = (0, *self.edges, x.shape[1])
        parts = (x[:, low:high].split(self.size, 1) for low, high in pairwise(bounds) if low < high)
        return torch.cat([part.mean(1, keepdim=True).expand_as(part) for one in parts for part in one], 1)


class HeadChoice(torch.nn.Module):
    """What a calibration measured of one layer, 0 at first.

    Args:
        channels: of a token; 0 for no rule.
        routed: number of heads that are chosen among.
        fill: (heads, D) of the means, ``None`` for none.

    Attributes:
        rule, offset: (routed, C) and (routed,), of the predicted log-energies; ``None`` without a rule.
        mean: (heads, D), mean output of every head over the tokens that leave it out; ``None`` without.
    """

    rule: torch.Tensor | None
    offset: torch.Tensor | None

    def __init__(self, channels: int, routed: int, fill: tuple[int, int] | None) -> None:
        super().__init__()
        self.register_buffer("rule", torch.zeros(routed, channels) if channels else None)
        self.register_buffer("offset", torch.zeros(routed) if channels else None)
        self.mean = None if fill is None else torch.nn.Parameter(torch.zeros(fill))

    def forward(
        self, signal: torch.Tensor, shared: int, top_k: int, groups: TokenGroups | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the gates (B, S, heads), 0 or 1, and the means of the heads.

        Args:
            signal: (B, S, C) input of the layer, or without a rule (B, S, heads), what the heads are ranked by.
            shared: heads that are always on, the first ones.
            top_k: active heads of the others; of equal ones the lower head.
            groups: tokens that choose together; ``None`` for each by itself.
        """
        if self.rule is None or self.offset is None:
            score = signal[..., shared:]
        else:
            score = precise_linear(signal, self.rule, self.offset)
        chosen = best_heads(score if groups is None else groups.mean(score), top_k)
        return F.pad(chosen.float(), (shared, 0), value=1.0), self.mean


def precise_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return ``x weight^T + bias`` in fp32, or in fp64 for an x of fp64, whatever autocast would do."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def best_heads(score: torch.Tensor, top_k: int) -> torch.Tensor:
    """Return which of (..., heads) are the ``top_k`` largest, bool; of equal ones the lower head."""
    best = score.detach().sort(dim=-1, descending=True, stable=True).indices[..., :top_k]
    return torch.zeros_like(score, dtype=torch.bool).scatter_(-1, best, True)


def query_norms(call: AttentionCall, rows: slice) -> torch.Tensor | None:
    """Return the norms (B, rows, H) of the queries, fp32, ``None`` where they are normalized and nothing else is known.

    Rotary embedding keeps norms, so that queries which nothing normalizes are those of the call.

    Args:
        call: the attention call.
        rows: of the sequence.
    """
    heads, count = call.q.shape[2], rows.stop - rows.start
    raw = call.layer.raw_queries if call.layer.normalizes_queries else call.q
    if raw is None or raw.shape[0] != call.q.shape[0]:
        return None
    if raw.ndim == 3 and raw.shape[-1] % heads == 0:
        raw = raw.unflatten(-1, (heads, -1))
    if raw.ndim != 4:
        return None
    if raw.shape[1] == heads != raw.shape[2]:
        raw = raw.transpose(1, 2)
    if raw.shape[2] != heads or raw.shape[1] not in (count, call.q.shape[1]):
        return None
    return (raw if raw.shape[1] == count else raw[:, rows]).float().norm(dim=-1)
