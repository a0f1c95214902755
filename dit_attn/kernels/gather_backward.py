"""Gradients of the gather path: probabilities are computed again chunk by chunk, so memory stays linear in S.

With P = exp(logits - lse) and a gradient g on the log-sum::

    dV = P^T dO        dS = P * (dO V^T - rowsum(dO * O) + g)        dQ = scale dS K        dK = scale dS^T Q

Everything is fp32 (fp64 for fp64 input). On the CPU the sums run in a fixed order: results are reproducible.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from dit_attn.kernels.scratch import Scratch, scratch_memory
from dit_attn.kernels.tiling import (
    LOG2E,
    NONE,
    Bucket,
    Group,
    Part,
    Precision,
    Problem,
    Work,
    buckets,
    chunks,
    groups,
    parts,
)


@dataclass
class _Sums:
    """Gradients of one group's key blocks, added up over its tiles.

    Attributes:
        k: (key heads * nk, kv_block * D).
        v: (key heads * nk, kv_block * Dv).
        bias: (heads|1, nk, kv_block), or ``None`` when no gradient is asked for.
    """

    k: torch.Tensor
    v: torch.Tensor
    bias: torch.Tensor | None


@dataclass(frozen=True)
class _Given:
    """What the forward pass left and what came back: out, grad_out (B, S, H, Dv), lse and grad_lse (B, H, S)."""

    out: torch.Tensor
    lse: torch.Tensor
    grad_out: torch.Tensor
    grad_lse: torch.Tensor


@dataclass(frozen=True)
class _Rows:
    """Per-tile tensors of a part: q, grad and dq (tiles, tokens, D), delta and top (tiles, tokens, 1).

    ``delta`` is what is taken off dO V^T; ``top`` is the log-sum in base-2 units, 0 for a row without keys.
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
    """Gradients of q, k, v (in their types) and, when ``bias_grad``, of ``key_bias``."""
    q, k, v = problem.q, problem.k, problem.v
    kind = Precision(lse.dtype, lse.dtype, lse.dtype)
    given = _Given(out, lse, grad_out, grad_lse)
    dq, dk, dv = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    db = None
    if bias_grad and problem.key_bias is not None:
        db = torch.zeros(problem.key_bias.shape, dtype=lse.dtype, device=q.device)
    with scratch_memory() as scratch:
        for group in groups(problem, kind, scratch):
            bias = torch.zeros_like(group.bias) if db is not None and group.bias is not None else None
            sums = _Sums(torch.zeros_like(group.k.rows), torch.zeros_like(group.v.rows), bias)
            for part in parts(problem, group):
                _part(problem, group, part, scratch, given, sums, dq)
            _finish(problem, group, sums, dk, dv, db)
    return dq, dk, dv, None if db is None or problem.key_bias is None else db.to(problem.key_bias.dtype)


def _finish(
    problem: Problem, group: Group, sums: _Sums, dk: torch.Tensor, dv: torch.Tensor, db: torch.Tensor | None
) -> None:
    """Write a group's sums to the gradients of its heads."""
    layout, batch = problem.layout, group.batch
    for grad, total in ((dk, sums.k), (dv, sums.v)):
        tokens = total.view(group.g1 - group.g0, layout.nk * layout.kv_block, -1)[:, : layout.kv_len]
        grad[batch, :, group.g0 : group.g1] = tokens.transpose(0, 1).to(grad.dtype)
    if db is not None and sums.bias is not None:
        heads = slice(group.g0 * problem.ratio, group.g1 * problem.ratio)
        target = db[batch if db.shape[0] > 1 else 0]
        target[heads if db.shape[1] > 1 else slice(None)] += sums.bias.flatten(1)[:, : layout.kv_len]


def _part(
    problem: Problem,
    group: Group,
    part: Part,
    scratch: Scratch,
    given: _Given,
    sums: _Sums,
    dq: torch.Tensor,
) -> None:
    q = part.tiles(problem.q, group.batch)
    grad_out = part.tiles(given.grad_out, group.batch).to(given.lse.dtype)
    delta = (grad_out * part.tiles(given.out, group.batch)).sum(-1, keepdim=True)
    lse = given.lse[group.batch, part.heads, part.rows].reshape(len(q), -1, 1)
    delta = delta - given.grad_lse[group.batch, part.heads, part.rows].reshape(len(q), -1, 1)
    rows = _Rows(q, grad_out, delta, lse.masked_fill(lse == NONE, 0.0) * LOG2E, torch.zeros_like(q))
    for bucket in buckets(problem, part):
        for work, low, high in chunks(problem, group, part, bucket, scratch):
            _chunk(work, low, high, rows, sums)
    if not problem.on_host:  # a tile without keys gathered block 0, which may hold anything
        rows.dq.masked_fill_((part.count == 0)[:, None, None], 0.0)
    part.put(dq, group.batch, rows.dq)


def _chunk(work: Work, low: int, high: int, rows: _Rows, sums: _Sums) -> None:
    bucket, scale = work.bucket, work.problem.scale
    p = work.logits(rows.q, low, high).sub_(bucket.of(rows.top, low, high)).exp2_()
    q, grad = bucket.of(rows.q, low, high).to(p.dtype), bucket.of(rows.grad, low, high)
    v = work.values(low, high)
    _add(sums.v, bucket, low, high, torch.bmm(p.transpose(1, 2), grad))
    ds = torch.bmm(grad, v.transpose(1, 2)).sub_(bucket.of(rows.delta, low, high)).mul_(p)
    if not work.problem.on_host:
        ds.masked_fill_(work.unread(low, high), 0.0)
    bucket.put(rows.dq, low, high, torch.bmm(ds, work.k).mul_(scale))
    _add(sums.k, bucket, low, high, torch.bmm(ds.transpose(1, 2), q).mul_(scale))
    if sums.bias is not None:
        _add(sums.bias.flatten(0, 1), bucket, low, high, ds.sum(1), bucket.bias_rows)


def _add(
    total: torch.Tensor, bucket: Bucket, low: int, high: int, value: torch.Tensor, rows: torch.Tensor | None = None
) -> None:
    """Add (n, keys, ...) of a chunk to the key blocks it was gathered from."""
    index = (bucket.rows if rows is None else rows)[low * bucket.width : high * bucket.width]
    value = value.reshape(high - low, -1)
    value = F.pad(value, (0, bucket.width * total.shape[1] - value.shape[1]))  # the ragged block's missing tokens
    total.index_add_(0, index, value.view(-1, total.shape[1]))
