"""Exact attention that also says what every key block contributes: its softmax mass, or the error of leaving it out.

For query i of query block u and key block j, with softmax weights ``p_it`` and output ``o_i``, the mass is
``m_uj = sum_i sum_(t in j) p_it``. Leaving j out, or letting pooled keys c of it stand for its keys, with the weights
``w_ic`` that they would have, changes the output to first order by ``r_ij = sum_t p_it (v_t - o_i) - sum_c w_ic (v_c -
o_i)``. The error is ``E_uj = sum_i |r_ij|^2``. Plain torch, some query blocks and key heads at a time, or the
Triton or C++ kernels where calls go to them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from dit_attn.errors import unknown
from dit_attn.kernels.backends.cpp.forward import cpp_block_stats
from dit_attn.kernels.backends.preference import CPP
from dit_attn.kernels.device import full_precision
from dit_attn.kernels.functional import choose_backend
from dit_attn.kernels.layouts.block_layout import BlockLayout, ceil_div
from dit_attn.kernels.problem import NEG_INF, Problem
from dit_attn.kernels.selection.select import check_pair
from dit_attn.kernels.terms import Compensation, pooled_compensation

STATISTICS = ("mass", "error")
AT_ONCE = 2**26
"""Bytes of a chunk's matrix of weights; the parts of its output by block are about as large."""
Fused = Callable[[Problem, str, Compensation | None], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class BlockStats:
    """Exact attention with the statistics of its blocks.

    Attributes:
        out: (B, Sq, H, D) in q's dtype.
        lse: (B, H, Sq) fp32, natural logarithm; ``-inf`` in a row without a key.
        blocks: (B, H, nq, nk) fp32, mass or error, summed over the rows of a query block.
    """

    out: torch.Tensor
    lse: torch.Tensor
    blocks: torch.Tensor


@torch.no_grad()
def attention_with_block_stats(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    q_block: int,
    kv_block: int,
    statistic: str = "error",
    pooled: int | None = None,
    scale: float | None = None,
    key_mask: torch.Tensor | None = None,
    key_bias: torch.Tensor | None = None,
) -> BlockStats:
    """Compute dense attention and the statistic of every pair of blocks. Not differentiable.

    Args:
        q: (B, Sq, H, D).
        k, v: (B, Sk, Hk, D); ``H % Hk == 0``.
        q_block, kv_block: tokens per block.
        statistic: ``"mass"`` or ``"error"``.
        pooled: tokens per pooled key that stands for a skipped block, a divisor of ``kv_block``; ``None`` where skipped
            keys are dropped. Of errors alone.
        scale: softmax scale, default ``D ** -0.5``.
        key_mask: (B, Sk) bool, keys that exist.
        key_bias: (B|1, H|1, Sk), added to the logits, natural logarithm; ``key_mask`` then only says which keys are
            pooled.

    Raises:
        DitAttnError: the tensors or block sizes do not fit, or an unknown statistic.
    """
    check_pair(q, k, q_block, kv_block, key_mask)
    if statistic not in STATISTICS:
        raise unknown("block statistic", statistic, STATISTICS)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    added, factor = _added(key_mask, key_bias), q.shape[-1] ** -0.5 if scale is None else scale
    stand_ins = None
    if statistic == "error" and pooled is not None:
        stand_ins = pooled_compensation(k.to(wide), v.to(wide), pooled, key_mask=key_mask)
    batch, q_len, heads, _ = q.shape
    layout = BlockLayout.dense(q_len, k.shape[1], q_block, kv_block, q.device)
    fused = _fused(choose_backend(q, layout, v=v, return_lse=True).backend, q.dtype)
    if fused is not None:
        problem = Problem(q, k, v, layout, factor, key_mask if key_bias is None else None, key_bias)
        return BlockStats(*fused(problem, statistic, stand_ins))
    found = BlockStats(
        q.new_empty(batch, q_len, heads, v.shape[-1]),
        q.new_empty(batch, heads, q_len, dtype=wide),
        q.new_empty(batch, heads, ceil_div(q_len, q_block), ceil_div(k.shape[1], kv_block), dtype=wide),
    )
    with full_precision(q.device):
        for part in _key_heads(q, k, v, factor, added, stand_ins, kv_block, wide):
            part.write(found, q_block, statistic)
    return found


def _triton(
    problem: Problem, statistic: str, pooled: Compensation | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from dit_attn.kernels.backends.triton.attention import triton_block_stats

    return triton_block_stats(problem, statistic, pooled)


def _fused(backend: str, dtype: torch.dtype) -> Fused | None:
    """The kernel for statistics that belongs to a backend; in fp32 that of Triton would not fit its registers."""
    if backend == CPP:
        return cpp_block_stats
    return _triton if backend == "triton" and dtype.itemsize == 2 else None


def _added(key_mask: torch.Tensor | None, key_bias: torch.Tensor | None) -> torch.Tensor | None:
    """(B|1, H|1, 1, Sk) what is added to the logits."""
    if key_bias is not None:
        return key_bias[:, :, None]
    if key_mask is None:
        return None
    return torch.zeros_like(key_mask, dtype=torch.float32).masked_fill(~key_mask, NEG_INF)[:, None, None]


@dataclass(frozen=True)
class _KeyHead:
    """One sample and key head, with its query heads G.

    Attributes:
        place: sample, and the first query head.
        q: (G, Sq, D), scaled.
        k: (Sk, D).
        v: (nk, kv_block, Dv), zero where padded.
        added: (G|1, 1, Sk), or ``None``.
        pooled: keys (nv, D), values (nk, C, Dv) and log weights (G|1, 1, nv) of pooled keys, or ``None``.
    """

    place: tuple[int, int]
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    added: torch.Tensor | None
    pooled: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None

    def write(self, found: BlockStats, q_block: int, statistic: str) -> None:
        """Compute output, LSE and statistics, some query blocks at a time."""
        sample, head = self.place
        heads = slice(head, head + len(self.q))
        nk, kv_block, _ = self.v.shape
        blocks = max(1, AT_ONCE // (self.v.element_size() * len(self.q) * q_block * nk * kv_block))
        for first in range(0, ceil_div(self.q.shape[1], q_block), blocks):
            rows = slice(first * q_block, min((first + blocks) * q_block, self.q.shape[1]))
            weights, lse = self._weights(self.q[:, rows])
            out, each = self._rows(self.q[:, rows], weights, lse, statistic)
            found.out[sample, rows, heads] = out.transpose(0, 1).to(found.out.dtype)
            found.lse[sample, heads, rows] = lse[..., 0]
            each = F.pad(each, (0, 0, 0, -each.shape[1] % q_block)).unflatten(1, (-1, q_block)).sum(2)
            found.blocks[sample, heads, first : first + each.shape[1]] = each

    def _weights(self, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Softmax weights (G, rows, nk, kv_block), 0 where padded, and the LSE (G, rows, 1)."""
        logits = q @ self.k.T
        if self.added is not None:
            logits = logits + self.added
        lse = torch.logsumexp(logits, -1, keepdim=True)
        weights = torch.exp(logits.sub_(lse.masked_fill(lse == NEG_INF, 0.0)))
        nk, kv_block, _ = self.v.shape
        return F.pad(weights, (0, nk * kv_block - weights.shape[-1])).unflatten(-1, (nk, kv_block)), lse

    def _rows(
        self, q: torch.Tensor, weights: torch.Tensor, lse: torch.Tensor, statistic: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Output (G, rows, Dv) and statistic (G, rows, nk) of some rows."""
        mass = weights.sum(-1)
        if statistic == "mass":
            return weights.flatten(2) @ self.v.flatten(0, 1), mass
        parts = _by_block(weights, self.v)  # (nk, G, rows, Dv)
        out = parts.sum(0)
        if self.pooled is not None:
            keys, values, log_weight = self.pooled
            nk, size, _ = values.shape
            stand = torch.exp(q @ keys.T + log_weight - lse.masked_fill(lse == NEG_INF, float("inf")))
            stand = F.pad(stand, (0, nk * size - stand.shape[-1])).unflatten(-1, (nk, size))
            parts = parts.sub_(_by_block(stand, values))
            mass = mass - stand.sum(-1)
        error = parts.sub_(mass.permute(2, 0, 1)[..., None] * out).square_().sum(-1)
        return out, error.permute(1, 2, 0)


def _by_block(weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """(nk, G, rows, Dv): weights (G, rows, nk, n) times values (nk, n, Dv), block by block."""
    groups, rows = weights.shape[:2]
    return (weights.permute(2, 0, 1, 3).flatten(1, 2) @ values).unflatten(1, (groups, rows))


def _key_heads(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    added: torch.Tensor | None,
    pooled: Compensation | None,
    kv_block: int,
    wide: torch.dtype,
) -> Iterator[_KeyHead]:
    """Every sample and key head by itself."""
    group = q.shape[2] // k.shape[2]
    for sample in range(q.shape[0]):
        for head in range(k.shape[2]):
            heads = slice(head * group, (head + 1) * group)
            few = None
            if pooled is not None:
                values = _blocks(pooled.v[sample, head].to(wide), kv_block // pooled.tokens)
                log_weight = pooled.log_weight[sample if len(pooled.log_weight) > 1 else 0]
                few = pooled.k[sample, head].to(wide), values, log_weight
            yield _KeyHead(
                (sample, head * group), q[sample, :, heads].transpose(0, 1).to(wide) * scale,
                k[sample, :, head].to(wide), _blocks(v[sample, :, head].to(wide), kv_block),
                _of(added, sample, heads), few,
            )  # fmt: skip


def _blocks(x: torch.Tensor, size: int) -> torch.Tensor:
    """(n, size, D): rows (S, D) in blocks, padded with zeros."""
    return F.pad(x, (0, 0, 0, -len(x) % size)).unflatten(0, (-1, size))


def _of(x: torch.Tensor | None, sample: int, heads: slice) -> torch.Tensor | None:
    """One sample and some heads (G|1, 1, n) of (B|1, H|1, 1, n)."""
    if x is None:
        return None
    own = x[sample if len(x) > 1 else 0]
    return own if len(own) == 1 else own[heads]
