"""Gradients of the gather backend: probabilities are recomputed chunk by chunk, so memory stays linear in S.

With P = exp(logits - lse) and a gradient g of the log-sum-exp::

    dV = P^T dO        dS = P * (dO V^T - rowsum(dO * O) + g)        dQ = scale dS K        dK = scale dS^T Q

Everything is fp32 (fp64 for fp64 input). On a CPU the order of summation is fixed: results are reproducible.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from dit_attn.kernels.backends.gather.head_groups import HeadGroup, Precision, gather_heads, split_heads
from dit_attn.kernels.backends.gather.tile_buffers import TileBuffers, iter_chunks
from dit_attn.kernels.backends.gather.tiling import QueryTiles, TileBucket, iter_buckets, iter_query_tiles
from dit_attn.kernels.backends.gather.workspace import Workspace, borrow_workspace
from dit_attn.kernels.problem import LOG2E, NEG_INF, Problem


@dataclass
class _Sums:
    """Gradients of the key blocks of one group of heads, summed over its tiles.

    Attributes:
        k: (key heads * nk, kv_block * D).
        v: (key heads * nk, kv_block * Dv).
        bias: (heads|1, nk, kv_block), or ``None`` when no gradient is requested.
    """

    k: torch.Tensor
    v: torch.Tensor
    bias: torch.Tensor | None


@dataclass(frozen=True)
class _Given:
    """Results of the forward pass and their gradients: out, grad_out (B, S, H, Dv), lse and grad_lse (B, H, S)."""

    out: torch.Tensor
    lse: torch.Tensor
    grad_out: torch.Tensor
    grad_lse: torch.Tensor


@dataclass(frozen=True)
class _Rows:
    """Tensors per tile: q, grad and dq (tiles, tokens, D), delta and top (tiles, tokens, 1).

    ``delta`` is subtracted from dO V^T; ``top`` is the log-sum-exp in base 2, 0 for a row without keys.
    """

    q: torch.Tensor
    grad: torch.Tensor
    delta: torch.Tensor
    top: torch.Tensor
    dq: torch.Tensor


def gather_backward(
    problem: Problem,
    out: torch.Tensor,
    lse: torch.Tensor,
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor,
    bias_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Compute the gradients of q, k, v (in their dtypes) and, with ``bias_grad``, of ``key_bias``.

    Args:
        problem: the call.
        out, lse: results of its forward pass.
        grad_out, grad_lse: their gradients.
        bias_grad: whether the gradient of ``key_bias`` is requested.
    """
    q, k, v = problem.q, problem.k, problem.v
    kind = Precision(lse.dtype, lse.dtype, lse.dtype)
    given = _Given(out, lse, grad_out, grad_lse)
    dq, dk, dv = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    db = None
    if bias_grad and problem.key_bias is not None:
        db = torch.zeros(problem.key_bias.shape, dtype=lse.dtype, device=q.device)
    split = split_heads(problem, kind)
    with borrow_workspace() as workspace:
        for index in range(len(split.ranges)):
            group = gather_heads(problem, kind, split, index, workspace)
            bias = torch.zeros_like(group.bias) if db is not None and group.bias is not None else None
            sums = _Sums(torch.zeros_like(group.k.rows), torch.zeros_like(group.v.rows), bias)
            for tiles in iter_query_tiles(problem, group):
                _backward_tiles(problem, group, tiles, workspace, given, sums, dq)
            _finish(problem, group, sums, dk, dv, db)
    return dq, dk, dv, None if db is None or problem.key_bias is None else db.to(problem.key_bias.dtype)


def _finish(
    problem: Problem, group: HeadGroup, sums: _Sums, dk: torch.Tensor, dv: torch.Tensor, db: torch.Tensor | None
) -> None:
    """Write the sums of a group to the gradients of its heads."""
    layout, batch = problem.layout, group.batch
    for grad, total in ((dk, sums.k), (dv, sums.v)):
        tokens = total.view(group.g1 - group.g0, layout.nk * layout.kv_block, -1)[:, : layout.kv_len]
        grad[batch, :, group.g0 : group.g1] = tokens.transpose(0, 1).to(grad.dtype)
    if db is not None and sums.bias is not None:
        heads = slice(group.g0 * problem.ratio, group.g1 * problem.ratio)
        target = db[batch if db.shape[0] > 1 else 0]
        target[heads if db.shape[1] > 1 else slice(None)] += sums.bias.flatten(1)[:, : layout.kv_len]


def _backward_tiles(
    problem: Problem,
    group: HeadGroup,
    tiles: QueryTiles,
    workspace: Workspace,
    given: _Given,
    sums: _Sums,
    dq: torch.Tensor,
) -> None:
    q = tiles.split(problem.q, group.batch)
    grad_out = tiles.split(given.grad_out, group.batch).to(given.lse.dtype)
    delta = (grad_out * tiles.split(given.out, group.batch)).sum(-1, keepdim=True)
    lse = given.lse[group.batch, tiles.heads, tiles.rows].reshape(len(q), -1, 1)
    delta = delta - given.grad_lse[group.batch, tiles.heads, tiles.rows].reshape(len(q), -1, 1)
    rows = _Rows(q, grad_out, delta, lse.masked_fill(lse == NEG_INF, 0.0) * LOG2E, torch.zeros_like(q))
    for bucket in iter_buckets(problem, tiles):
        for buffers, low, high in iter_chunks(problem, group, tiles, bucket, workspace):
            _chunk(buffers, low, high, rows, sums)
    if not problem.on_host:  # a tile without keys gathered block 0, which may be NaN
        rows.dq.masked_fill_((tiles.count == 0)[:, None, None], 0.0)
    tiles.write(dq, group.batch, rows.dq)


def _chunk(buffers: TileBuffers, low: int, high: int, rows: _Rows, sums: _Sums) -> None:
    bucket, scale = buffers.bucket, buffers.problem.scale
    p = buffers.logits(rows.q, low, high).sub_(bucket.of(rows.top, low, high)).exp2_()
    q, grad = bucket.of(rows.q, low, high).to(p.dtype), bucket.of(rows.grad, low, high)
    v = buffers.values(low, high)
    _add(sums.v, bucket, low, high, torch.bmm(p.transpose(1, 2), grad))
    ds = torch.bmm(grad, v.transpose(1, 2)).sub_(bucket.of(rows.delta, low, high)).mul_(p)
    if not buffers.problem.on_host:
        ds.masked_fill_(buffers.unattended(low, high), 0.0)
    bucket.put(rows.dq, low, high, torch.bmm(ds, buffers.k).mul_(scale))
    _add(sums.k, bucket, low, high, torch.bmm(ds.transpose(1, 2), q).mul_(scale))
    if sums.bias is not None:
        _add(sums.bias.flatten(0, 1), bucket, low, high, ds.sum(1), bucket.bias_rows)


def _add(
    total: torch.Tensor, bucket: TileBucket, low: int, high: int, value: torch.Tensor, rows: torch.Tensor | None = None
) -> None:
    """Add (n, keys, ...) of a chunk to the key blocks they were gathered from."""
    index = (bucket.rows if rows is None else rows)[low * bucket.width : high * bucket.width]
    value = value.reshape(high - low, -1)
    value = F.pad(value, (0, bucket.width * total.shape[1] - value.shape[1]))  # the ragged block's missing tokens
    total.index_add_(0, index, value.view(-1, total.shape[1]))
