"""Attention with pooled keys of two sizes: finer ones stand for the best of the skipped blocks, coarse for the rest.

The finer keys are a short sequence of their own, attended to by a block layout with the lists of those blocks; the two
results merge by their log-sum-exp into one softmax.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from dit_attn.errors import DitAttnError
from dit_attn.kernels.functional import sparse_attention
from dit_attn.kernels.layouts.block_layout import BlockLayout
from dit_attn.kernels.problem import NEG_INF
from dit_attn.kernels.terms import Compensation, LogitBias


@dataclass(frozen=True)
class FineLevel:
    """Finer pooled keys for some of the skipped blocks.

    Attributes:
        layout: those blocks, of the sizes of the call's layout, and none that it attends to.
        pooled: the finer keys; their variance and first-order term are not used.
    """

    layout: BlockLayout
    pooled: Compensation

    @property
    def cost(self) -> float | torch.Tensor:
        """Share of dense attention: the finer keys that are attended to. A tensor on an accelerator."""
        counts = self.layout.kv_num_blocks
        on_host = counts.device.type == "cpu"
        density = self.layout.density if on_host else counts.float().mean() / self.layout.nk
        return density / self.pooled.tokens


def two_level_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: BlockLayout,
    fine: FineLevel,
    compensation: Compensation,
    *,
    bias: LogitBias | None = None,
    scale: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute block-sparse attention whose skipped blocks enter the softmax as pooled keys of two sizes.

    Args:
        q: (B, Sq, H, D).
        k, v: (B, Sk, Hk, D).
        layout: the blocks that are computed exactly.
        fine: the finer pooled keys, and the blocks that they stand for.
        compensation: the coarse pooled keys, for all other skipped blocks.
        bias: low-rank bias of the logits; both compensations have their factor of it then.
        scale: softmax scale, default ``D ** -0.5``.
        options: ``key_mask``, ``key_bias`` and ``backend`` of :func:`~dit_attn.kernels.sparse_attention`.

    Returns:
        o (B, Sq, H, D) in q's dtype, lse (B, H, Sq).

    Raises:
        DitAttnError: an argument does not fit.
    """
    pooled, blocks = fine.pooled, fine.layout
    sizes = (layout.q_block, layout.kv_block, layout.q_len, layout.kv_len)
    if (blocks.q_block, blocks.kv_block, blocks.q_len, blocks.kv_len) != sizes or layout.kv_block % pooled.tokens:
        raise DitAttnError(
            f"fine needs a layout of the call's sizes {sizes} and tokens that divide kv_block {layout.kv_block}, got "
            f"{pooled.tokens}; build it from the same blocks"
        )
    coarse = replace(compensation, left_out=blocks.block_mask())
    short = BlockLayout(
        layout.q_block, layout.kv_block // pooled.tokens, layout.q_len, pooled.k.shape[2], blocks.kv_indices,
        blocks.kv_num_blocks, blocks.uniform,
    )  # fmt: skip
    keys, values = (x.transpose(1, 2).to(q.dtype) for x in (pooled.k, pooled.v))
    found = sparse_attention(
        q, k, v, layout, scale=scale, bias=bias, compensation=coarse, return_lse=True, **options
    )  # fmt: skip
    finer = sparse_attention(
        q, keys, values, short, scale=scale, key_bias=pooled.log_weight,
        bias=None if bias is None or pooled.bias is None else LogitBias(bias.q, pooled.bias), return_lse=True,
        backend=options.get("backend"),
    )  # fmt: skip
    assert isinstance(found, tuple) and isinstance(finer, tuple)
    return _merged(found, finer)


def _merged(
    one: tuple[torch.Tensor, torch.Tensor], other: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """One softmax of two results (o, lse) over different keys."""
    lse = torch.logaddexp(one[1], other[1])
    safe = lse.masked_fill(lse == NEG_INF, 0.0)
    parts = [out * torch.exp(part - safe).transpose(1, 2)[..., None] for out, part in (one, other)]
    return (parts[0] + parts[1]).to(one[0].dtype), lse
