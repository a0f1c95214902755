"""SLA by its definition: classes of blocks and both branches with full matrices, in fp64."""

from __future__ import annotations

import torch

from dit_attn import SLA
from dit_attn.kernels.linear.feature_maps import feature_map
from dit_attn.processors.core.call import AttentionCall, Request
from dit_attn.processors.core.executor import read_mask
from dit_attn.processors.methods.pooled_scores import ordered_scores
from dit_attn.processors.methods.visual_order import visual_order


def classes(scores: torch.Tensor, settings: SLA, forced: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Critical blocks, and those of the linear branch, (B, H, nq, nk) bool, row by row."""
    nk = scores.shape[-1]
    assert isinstance(settings.density, float)
    wanted = max(1, -int(-settings.density * nk // 1))
    critical, linear = torch.zeros_like(scores, dtype=torch.bool), torch.zeros_like(scores, dtype=torch.bool)
    for place in torch.cartesian_prod(*(torch.arange(n) for n in scores.shape[:3])).tolist():
        row, must = scores[tuple(place)].tolist(), forced.expand_as(scores)[tuple(place)].tolist()
        best = sorted(range(nk), key=lambda j: (not must[j], -row[j], j))
        exact = [j for j in best[: max(wanted, sum(must))] if must[j] or row[j] > -torch.inf]
        rest = sorted((j for j in range(nk) if j not in exact), key=lambda j: (row[j], j))
        dropped = rest[: int(settings.negligible * nk)] if settings.linear_domain == "marginal" else []
        for j in range(nk):
            critical[(*place, j)] = j in exact
            inside = settings.linear_domain == "all" or (j not in exact and j not in dropped)
            linear[(*place, j)] = inside and row[j] > -torch.inf
    return critical, linear


def sparse_linear(call: AttentionCall, settings: SLA, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Visual rows (B, Sv, H, D) of a call, in the order of the sequence."""
    request = Request()
    assert read_mask(call, request) is None and call.tokens is not None
    rows = request.permute(call, *visual_order(call.tokens, settings.order, settings.tile, settings.kv_block))
    scores = ordered_scores(rows, settings.q_block, settings.kv_block, call.softmax_scale)
    forced = rows.order.forced((), rows.k.shape[1], settings.q_block, settings.kv_block)
    q, k, v = (x.double().transpose(1, 2) for x in (rows.q, rows.k, rows.v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    factor = torch.ones(k.shape[0], 1, k.shape[2], dtype=torch.float64)
    if rows.key_mask is not None:
        factor = rows.key_mask[:, None].double()
    if rows.key_bias is not None:
        factor = rows.key_bias.double().exp()

    def tokens(blocks: torch.Tensor) -> torch.Tensor:
        pairs = blocks.repeat_interleave(settings.q_block, -2).repeat_interleave(settings.kv_block, -1)
        return pairs[..., : q.shape[2], : k.shape[2]]

    critical, linear = (tokens(x) for x in classes(scores, settings, forced))
    logits = (q @ k.mT * call.softmax_scale + factor.log()[:, :, None]).masked_fill(~critical, -torch.inf)
    exact = torch.softmax(logits, -1) @ v
    weights = feature_map(q, settings.feature_map) @ feature_map(k, settings.feature_map).mT * factor[:, :, None]
    weights = weights.masked_fill(~linear, 0.0)
    total = weights.sum(-1, keepdim=True)
    pooled = (weights @ v) / total.masked_fill(total == 0.0, 1.0)
    return rows.unpermute((exact + pooled @ weight.double().T + bias.double()).transpose(1, 2))
