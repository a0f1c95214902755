"""Linear attention over key blocks in plain torch: every sum over blocks is a matrix product.

With features f of the queries and g of the keys, and the set C of pairs of blocks that attend to each other (SLA,
arXiv 2509.24006, section 4)::

    H_j = sum_{n in j} g_n^T v_n     Z_j = sum_{n in j} g_n        per key block
    h_i = sum_{j in C_i} H_j         z_i = sum_{j in C_i} Z_j      one product with the 0/1 matrix of C
    o_n = f_n h_i / (f_n . z_i)                                    0 where the denominator is

and backwards, with ``u = f / (f . z)``, the gradient dO and ``d = rowsum(dO * o)``::

    R_i = u^T dO     r_i = u^T d     df = (dO h^T - d z) / (f . z)   per query block
    G_j = sum_{i: j in C_i} R_i      t_j likewise                    one product with the transposed matrix
    dg  = v G^T - t                  dv = g G                        per key block

Nothing of the forward pass is stored but its inputs and its output: h, the largest tensor, is computed again. Sums are
fp32 (fp64 for fp64 input) and in a fixed order. A few heads are computed at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F

from dit_attn.kernels.device import chunk_sizes
from dit_attn.kernels.linear.call import LinearCall
from dit_attn.kernels.linear.feature_maps import feature_gradient, feature_map


def linear_forward(call: LinearCall) -> torch.Tensor:
    """Compute o (B, Sq, H, Dv) in q's dtype."""
    out = call.q.new_empty(*call.q.shape[:3], call.v.shape[-1])
    for heads in _head_groups(call):
        heads.write_rows(out, heads.f @ heads.h * heads.inverse)
    return out


def linear_backward(
    call: LinearCall, out: torch.Tensor, grad: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute the gradients of q, k and v, in their dtypes.

    Args:
        call: the call.
        out: its result.
        grad: the gradient of the result.
    """
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (call.q, call.k, call.v))
    for heads in _head_groups(call):
        do = heads.rows(grad)
        spent = (do * heads.rows(out)).sum(-1, keepdim=True)
        df = (do @ heads.h.mT - spent * heads.z[..., None, :]) * heads.inverse
        heads.write_rows(dq, feature_gradient(heads.rows(call.q), heads.f, df, call.feature_map))
        u = heads.f * heads.inverse
        total, t = heads.over_queries(u.mT @ do), heads.over_queries((u.mT @ spent).squeeze(-1))
        dg = heads.v @ total.mT - t[..., None, :]
        heads.write_keys(dv, heads.g @ total)
        dg = dg if heads.weight is None else dg * heads.weight
        heads.write_keys(dk, feature_gradient(heads.keys(call.k), heads.plain, dg, call.feature_map))
    return dq, dk, dv


def _head_groups(call: LinearCall) -> Iterator[_Heads]:
    """Key heads of one sample, as many at a time as fit the working size of the device."""
    element = 8 if call.q.dtype == torch.float64 else 4
    sums = (call.nq * call.ratio + call.nk if call.blocks is not None else 2) * call.k.shape[-1] * call.v.shape[-1]
    step = max(1, chunk_sizes(call.q.device).group // (element * sums))
    for batch in range(call.q.shape[0]):
        for first in range(0, call.k.shape[2], step):
            yield _Heads(call, batch, first, min(first + step, call.k.shape[2]))


@dataclass(frozen=True)
class _Heads:
    """Key heads ``first`` to ``last`` (G of them) of one sample, with their r query heads each.

    Without ``blocks`` all tokens are one block.
    """

    call: LinearCall
    batch: int
    first: int
    last: int

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64 if self.call.q.dtype == torch.float64 else torch.float32

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        """(G, r, nq, q_block, D) of x (B, Sq, H, D), 0 past the end."""
        size = x.shape[1] if self.call.blocks is None else self.call.q_block
        ratio = self.call.ratio
        tokens = x[self.batch, :, self.first * ratio : self.last * ratio].transpose(0, 1).to(self.dtype)
        return _in_blocks(tokens, size).unflatten(0, (-1, ratio))

    def keys(self, x: torch.Tensor) -> torch.Tensor:
        """(G, nk, kv_block, D) of x (B, Sk, Hk, D), 0 past the end."""
        size = x.shape[1] if self.call.blocks is None else self.call.kv_block
        return _in_blocks(x[self.batch, :, self.first : self.last].transpose(0, 1).to(self.dtype), size)

    def write_rows(self, target: torch.Tensor, x: torch.Tensor) -> None:
        """Write (G, r, nq, q_block, D) to the heads of ``target`` (B, Sq, H, D)."""
        ratio = self.call.ratio
        x = x.flatten(0, 1).flatten(1, 2)[:, : target.shape[1]]
        target[self.batch, :, self.first * ratio : self.last * ratio] = x.transpose(0, 1)

    def write_keys(self, target: torch.Tensor, x: torch.Tensor) -> None:
        """Write (G, nk, kv_block, D) to the heads of ``target`` (B, Sk, Hk, D)."""
        target[self.batch, :, self.first : self.last] = x.flatten(1, 2)[:, : target.shape[1]].transpose(0, 1)

    @cached_property
    def weight(self) -> torch.Tensor | None:
        """(G|1, nk, kv_block, 1) factor of the keys' features, 0 past the end; ``None`` for 1."""
        given, keys = self.call.key_weight, self.call.k.shape[1]
        size = keys if self.call.blocks is None else self.call.kv_block
        if given is None:
            if keys % size == 0:
                return None
            given = torch.ones(1, 1, keys, device=self.call.k.device)
        given = given[self.batch if given.shape[0] > 1 else 0]
        given = given[self.first : self.last] if given.shape[0] > 1 else given
        return _in_blocks(given[..., None].to(self.dtype), size)

    @cached_property
    def plain(self) -> torch.Tensor:
        """(G, nk, kv_block, D) features of the keys, without their weights."""
        return feature_map(self.keys(self.call.k), self.call.feature_map)

    @cached_property
    def g(self) -> torch.Tensor:
        """The same with their weights; a key of weight 0 may be NaN."""
        return self.plain if self.weight is None else (self.plain * self.weight).masked_fill(self.weight == 0.0, 0.0)

    @cached_property
    def v(self) -> torch.Tensor:
        """(G, nk, kv_block, Dv)."""
        v = self.keys(self.call.v)
        return v if self.call.key_weight is None or self.weight is None else v.masked_fill(self.weight == 0.0, 0.0)

    @cached_property
    def f(self) -> torch.Tensor:
        """(G, r, nq, q_block, D) features of the queries."""
        return feature_map(self.rows(self.call.q), self.call.feature_map)

    @cached_property
    def pairs(self) -> torch.Tensor | None:
        """(G, r * nq, nk), 1 where the query block attends to the key block; ``None`` where all do."""
        blocks, ratio = self.call.blocks, self.call.ratio
        if blocks is None:
            return None
        blocks = blocks[self.batch if blocks.shape[0] > 1 else 0]
        blocks = blocks.expand(self.call.q.shape[2], -1, -1)[self.first * ratio : self.last * ratio]
        return blocks.unflatten(0, (-1, ratio)).flatten(1, 2).to(self.dtype)

    def over_keys(self, x: torch.Tensor) -> torch.Tensor:
        """Sum (G, nk, ...) over the key blocks of every query block: (G, r|1, nq, ...)."""
        if self.pairs is None:
            return x[:, None]
        return (self.pairs @ x.flatten(2)).unflatten(1, (self.call.ratio, -1)).unflatten(-1, x.shape[2:])

    def over_queries(self, x: torch.Tensor) -> torch.Tensor:
        """Sum (G, r, nq, ...) over the query blocks of every key block: (G, nk, ...)."""
        if self.pairs is None:
            return x.sum(1)
        return (self.pairs.mT @ x.flatten(1, 2).flatten(2)).unflatten(-1, x.shape[3:])

    @cached_property
    def h(self) -> torch.Tensor:
        """(G, r|1, nq, D, Dv), sums of g^T v."""
        return self.over_keys(self.g.mT @ self.v)

    @cached_property
    def z(self) -> torch.Tensor:
        """(G, r|1, nq, D), sums of g."""
        return self.over_keys(self.g.sum(-2))

    @cached_property
    def inverse(self) -> torch.Tensor:
        """(G, r, nq, q_block, 1), 1 / (f . z), and 0 where that is 0."""
        total = self.f @ self.z[..., None]
        return total.reciprocal().masked_fill(total == 0.0, 0.0)


def _in_blocks(x: torch.Tensor, size: int) -> torch.Tensor:
    """(..., S, D) as (..., blocks, size, D), with zeros past the end."""
    missing = -x.shape[-2] % size
    return (F.pad(x, (0, 0, 0, missing)) if missing else x).unflatten(-2, (-1, size))
