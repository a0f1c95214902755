"""Choosing key blocks from pooled queries and keys.

Every query block is represented by the mean of its queries and every key block by the mean of its keys; their product
estimates the block's logits. Everything here is linear in the sequence but for the (nq, nk) table of block scores.

Methods call :func:`plan_blocks` (or :func:`plan_scores` with scores of their own). What runs is plain torch, which is
also the reference, or on an NVIDIA GPU with Triton the fused kernels of ``triton_selection``, which choose the same
blocks without the table, the sort and the temporaries.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple, overload

import torch
import torch.nn.functional as F

from dit_attn.errors import DitAttnError, unknown
from dit_attn.kernels.checks import (
    check_blocks,
    check_choices,
    check_heads,
    check_key_mask,
    check_sizes,
    check_tokens,
    dtype_name,
)
from dit_attn.kernels.device import full_precision, refuse_triton_device
from dit_attn.kernels.layout import BlockLayout, ceil_div, readable
from dit_attn.kernels.masks import pack_bits

CACHED = 1 << 20
"""Bytes of fp32 a CPU widens at a time: what stays in its cache."""
PIECE = 1 << 26
"""Bytes of fp32 temporaries elsewhere."""
LONGEST = 8192
"""Key blocks the fused kernels can choose from."""


Budget = float | torch.Tensor
"""A share in (0, 1]: a number, or a 0-d fp32 or fp64 tensor that may hold another value at every call of one graph."""


class BlockPlan(NamedTuple):
    """What a selection says.

    Attributes:
        layout: the chosen key blocks of every query block.
        kept_mass: (B, H, nq) fp32, share of the pooled softmax mass that lies in the chosen blocks; with ``stats``.
        bits: (B, H, nq, ceil(nk / 32)) int32, bit ``j % 32`` of word ``j // 32`` set where block j is chosen; with
            ``stats``.
    """

    layout: BlockLayout
    kept_mass: torch.Tensor | None = None
    bits: torch.Tensor | None = None


# -- plans -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def plan_blocks(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    q_block: int,
    kv_block: int,
    density: Budget | None = None,
    top_p: Budget | None = None,
    k_min: int = 1,
    forced: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    scale: float | None = None,
    stats: bool = False,
    backend: str | None = None,
) -> BlockPlan:
    """Pool, score and choose: :func:`block_scores` and :func:`select_blocks` in one call. Not differentiable.

    Args:
        q: (B, S, H, D).
        k: (B, Sk, Hk, D); ``H % Hk == 0``.
        q_block, kv_block: tokens per block.
        density: fraction of key blocks per query block; ``ceil(density * nk)`` are kept, forced ones inside the budget.
            As a tensor on the device of q, it may change from call to call of a compiled graph; the
            lists are then as wide as a dense row.
        top_p: alternatively, softmax mass to keep; a tensor likewise.
        k_min: with ``top_p``, the smallest number of blocks per row.
        forced: (B|1, H|1, nq|1, nk|1) bool, blocks that are always kept.
        key_mask: (B, Sk) bool, keys that exist.
        scale: softmax scale, default ``D ** -0.5``.
        stats: also return the kept mass and the bits.
        backend: ``"triton"`` or ``"torch"`` forces it; ``None`` picks (:func:`refuse_fused` says why not Triton).

    Raises:
        DitAttnError: the budget, the heads, a mask or the forced backend do not fit.
    """
    check_budget(density, top_p)
    check_pair(q, k, q_block, kv_block, key_mask)
    check_choices((q.shape[0], q.shape[2], ceil_div(q.shape[1], q_block), ceil_div(k.shape[1], kv_block)), forced)
    if _fused(backend, q, ceil_div(k.shape[1], kv_block), q.shape[-1]):
        from dit_attn.kernels.triton_selection import fused_select

        return BlockPlan(
            *fused_select(
                q, k, q_block=q_block, kv_block=kv_block, density=density, top_p=top_p, k_min=k_min, forced=forced,
                key_mask=key_mask, scale=scale, stats=stats,
            )
        )  # fmt: skip
    scores = block_scores(q, k, q_block, kv_block, scale, key_mask)
    return plan_scores(
        scores, density=density, top_p=top_p, k_min=k_min, forced=forced, q_len=q.shape[1], kv_len=k.shape[1],
        q_block=q_block, kv_block=kv_block, stats=stats, backend="torch",
    )  # fmt: skip


@torch.no_grad()
def plan_scores(
    scores: torch.Tensor,
    *,
    density: Budget | None = None,
    top_p: Budget | None = None,
    k_min: int = 1,
    forced: torch.Tensor | None = None,
    q_len: int,
    kv_len: int,
    q_block: int,
    kv_block: int,
    stats: bool = False,
    backend: str | None = None,
) -> BlockPlan:
    """:func:`select_blocks` for scores (B, H, nq, nk) a method made itself; arguments as there and in plan_blocks."""
    check_budget(density, top_p)
    check_blocks("scores", scores, q_len, kv_len, q_block, kv_block)
    check_choices(tuple(scores.shape), forced)
    sizes = {"q_len": q_len, "kv_len": kv_len, "q_block": q_block, "kv_block": kv_block}
    if _fused(backend, scores, scores.shape[-1]):
        from dit_attn.kernels.triton_selection import fused_select_scores

        return BlockPlan(
            *fused_select_scores(
                scores, density=density, top_p=top_p, k_min=k_min, forced=forced, stats=stats, **sizes
            )
        )
    layout = select_blocks(scores, density=density, top_p=top_p, k_min=k_min, forced=forced, **sizes)
    return BlockPlan(layout, kept_mass(scores, layout), selected_bits(layout)) if stats else BlockPlan(layout)


def refuse_fused(x: torch.Tensor, kv_blocks: int = 1, head_dim: int = 1) -> str | None:
    """Why the fused kernels cannot read ``x`` (q or scores) or choose from so many blocks; ``None`` if they can."""
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"the kernels compute in fp32, which does not hold {dtype_name(x.dtype)}"
    if head_dim > 256:
        return f"head size {head_dim} is above 256"
    if kv_blocks > LONGEST:
        return f"{kv_blocks} key blocks are more than {LONGEST}"
    return refuse_triton_device(x.device)


def _fused(backend: str | None, x: torch.Tensor, kv_blocks: int = 1, head_dim: int = 1) -> bool:
    """Whether the fused kernels run: when asked for, or on a GPU that can."""
    if backend not in (None, "triton", "torch"):
        raise unknown("selection backend", backend, ("triton", "torch"))
    if backend == "torch" or (backend is None and x.device.type == "cpu"):
        return False
    refusal = refuse_fused(x, kv_blocks, head_dim)
    if refusal and backend:
        raise DitAttnError(f"selection backend 'triton' cannot run this call: {refusal}; use 'torch' or leave it out")
    return refusal is None


# -- pooling -----------------------------------------------------------------------------------------------------------


def pool_blocks(x: torch.Tensor, block: int, key_mask: torch.Tensor | None = None) -> torch.Tensor:
    """Mean over the valid tokens of every block.

    Args:
        x: (B, S, H, D).
        block: tokens per block; the last block may be ragged.
        key_mask: (B, S) bool, tokens that exist; ``None`` for all.

    Returns:
        (B, H, n, D) fp32; 0 for a block without a valid token.
    """
    _check_pooled(x, block, key_mask)
    means = [tokens.sum(2, dtype=torch.float32) / number for tokens, _, number in _pieces(x, block, key_mask, False)]
    return torch.cat(means, 1).transpose(1, 2)


def pool_squares(x: torch.Tensor, block: int, key_mask: torch.Tensor | None = None) -> torch.Tensor:
    """Mean of the squares in every block: as :func:`pool_blocks`, without squaring x whole."""
    _check_pooled(x, block, key_mask)
    pieces = _pieces(x, block, key_mask, True)
    return torch.cat([tokens.square().sum(2) / number for tokens, _, number in pieces], 1).transpose(1, 2)


def pool_stats(
    x: torch.Tensor, block: int, key_mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean of every block, and channel by channel the mean distance of its tokens to it.

    With the mean ``m`` and the mean distance ``a = mean |x - m|`` of a query and a key block, the gain test of
    Rectified SpaAttn (its GAPR) is ``|mq . mk| > |aq . mk| + |mq . ak|``.

    Args:
        x, block, key_mask: as in :func:`pool_blocks`.

    Returns:
        mean and mean distance, (B, H, n, D) fp32 each; 0 for a block without a valid token.
    """
    _check_pooled(x, block, key_mask)
    if _fused(None, x, head_dim=x.shape[-1]):
        from dit_attn.kernels.triton_pooling import fused_pool

        pooled, spread, _ = fused_pool(x, block, key_mask, deviation=True)
        assert spread is not None
        return pooled, spread
    means, distances = [], []
    for tokens, exists, number in _pieces(x, block, key_mask, True):
        mean = tokens.sum(2) / number
        distance = (tokens - mean[:, :, None]).abs()
        if exists is not None:
            distance = distance.masked_fill(~exists, 0.0)
        means.append(mean)
        distances.append(distance.sum(2) / number)
    return torch.cat(means, 1).transpose(1, 2), torch.cat(distances, 1).transpose(1, 2)


def _pieces(
    x: torch.Tensor, block: int, key_mask: torch.Tensor | None, widen: bool
) -> Iterator[tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]]:
    """Runs of blocks: tokens (B, m, block, H, D), 0 where they do not exist; which exist; their number, at least 1.

    The sequence is never copied whole: plain sums read it in place, and what has to be widened to fp32 or masked goes
    piece by piece (a CPU sums bf16 several times slower than it widens and sums it in cache).
    """
    seq = x.shape[1]
    full = seq // block
    cpu = readable(x)
    widen = widen or (cpu and x.dtype in (torch.bfloat16, torch.float16))
    step = max(full, 1)
    if (widen or key_mask is not None) and not torch.compiler.is_compiling():
        each = 4 * x.shape[0] * block * x.shape[2] * x.shape[3]
        step = max(1, (CACHED if cpu else PIECE) // max(each, 1))
    bounds = [(low, min(low + step, full), block) for low in range(0, full, step)]
    if seq % block or not seq:
        bounds.append((full, full + 1, seq - full * block))
    for low, high, length in bounds:
        tokens = x[:, low * block : low * block + (high - low) * length].unflatten(1, (high - low, length))
        tokens = tokens.to(torch.float32) if widen else tokens
        exists, number = None, torch.full((), float(max(length, 1)), device=x.device)
        if key_mask is not None:
            there = key_mask[:, low * block : low * block + (high - low) * length].unflatten(1, (high - low, length))
            exists = there[..., None, None]
            tokens = tokens.masked_fill(~exists, 0.0)
            number = exists.sum(2, dtype=torch.float32).clamp(min=1.0)
        yield tokens, exists, number


def _check_pooled(x: torch.Tensor, block: int, key_mask: torch.Tensor | None) -> None:
    check_tokens("x", x)
    check_sizes(block=block)
    check_key_mask(x, key_mask)


def block_counts(x: torch.Tensor, block: int, key_mask: torch.Tensor | None = None) -> torch.Tensor:
    """(B|1, 1, n) fp32, the valid tokens of every block of x (B, S, H, D)."""
    seq = x.shape[1]
    n = ceil_div(seq, block)
    if key_mask is not None:
        return F.pad(key_mask, (0, n * block - seq)).unflatten(1, (n, block)).sum(-1, dtype=torch.float32)[:, None]
    starts = torch.arange(n, device=x.device) * block
    return (seq - starts).clamp(max=block).to(torch.float32).view(1, 1, n)


# -- scores and choice -----------------------------------------------------------------------------------------------


def block_scores(
    q: torch.Tensor,
    k: torch.Tensor,
    q_block: int,
    kv_block: int,
    scale: float | None = None,
    key_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Logit of every (query block, key block) pair from their pooled vectors.

    The logarithm of the number of valid keys is added, so that a softmax over the row weighs a ragged block rightly; a
    block without a valid key gets ``-inf`` and is never chosen.

    Args:
        q: (B, S, H, D).
        k: (B, Sk, Hk, D); ``H % Hk == 0``.
        q_block, kv_block: tokens per block.
        scale: softmax scale, default ``D ** -0.5``.
        key_mask: (B, Sk) bool, keys that exist.

    Returns:
        (B, H, nq, nk) fp32.

    Raises:
        DitAttnError: q, k, a block size or the mask does not fit; the message says what to do.
    """
    check_pair(q, k, q_block, kv_block, key_mask)
    heads, key_heads = q.shape[2], k.shape[2]
    pooled_q = pool_blocks(q, q_block).unflatten(1, (key_heads, heads // key_heads))
    pooled_k = pool_blocks(k, kv_block, key_mask)[:, :, None]
    with full_precision(q.device):
        scores = (pooled_q @ pooled_k.transpose(-1, -2)).flatten(1, 2)
    scores = scores * (q.shape[-1] ** -0.5 if scale is None else scale)
    return scores + torch.log(block_counts(k, kv_block, key_mask))[:, :, None, :]


def select_blocks(
    scores: torch.Tensor,
    *,
    density: Budget | None = None,
    top_p: Budget | None = None,
    k_min: int = 1,
    forced: torch.Tensor | None = None,
    q_len: int,
    kv_len: int,
    q_block: int,
    kv_block: int,
) -> BlockLayout:
    """The layout for a budget.

    Args:
        scores: (B, H, nq, nk) fp32 logits from :func:`block_scores`.
        density: fraction of key blocks per query block; ``ceil(density * nk)`` are kept, forced ones inside the budget.
        top_p: alternatively, softmax mass to keep.
        k_min: with ``top_p``, the smallest number of blocks per row.
        forced: broadcastable bool, blocks that are always kept.
        q_len, kv_len: tokens.
        q_block, kv_block: tokens per block.

    Raises:
        DitAttnError: both or neither of density and top_p, or one out of (0, 1].
    """
    check_budget(density, top_p)
    sizes = {"q_len": q_len, "kv_len": kv_len, "q_block": q_block, "kv_block": kv_block}
    if top_p is not None:
        return BlockLayout.from_topp(scores, top_p, k_min, forced, **sizes)
    assert density is not None
    return BlockLayout.from_topk(scores, blocks_of_density(density, scores.shape[-1]), forced, **sizes)


def check_pair(q: torch.Tensor, k: torch.Tensor, q_block: int, kv_block: int, key_mask: torch.Tensor | None) -> None:
    """Raises DitAttnError unless q (B, S, H, D), k (B, Sk, Hk, D), the block sizes and the mask go together."""
    for name, x in (("q", q), ("k", k)):
        check_tokens(name, x)
    if k.device != q.device:
        raise DitAttnError(f"k is on {k.device} and q on {q.device}; move it")
    check_heads(q, k)
    check_sizes(Sq=q.shape[1], Sk=k.shape[1], q_block=q_block, kv_block=kv_block)
    check_key_mask(k, key_mask)


def check_budget(density: Budget | None, top_p: Budget | None) -> None:
    """Raises DitAttnError unless exactly one of the two is given, in (0, 1].

    A tensor on a device, or in a graph that is being traced, is not read: the kernels take it as if it were clamped.
    """
    if (density is None) == (top_p is None):
        raise DitAttnError(f"give exactly one of density and top_p, got density={density} and top_p={top_p}")
    name = "density" if top_p is None else "top_p"
    share = density if top_p is None else top_p
    if isinstance(share, torch.Tensor):
        if share.ndim or share.dtype not in (torch.float32, torch.float64):
            raise DitAttnError(
                f"{name} as a tensor must be 0-d float32 or float64, got {tuple(share.shape)} {share.dtype}; "
                "give torch.tensor(0.25, device=q.device)"
            )
        if not readable(share):
            return
    if density is not None and not 0.0 < density <= 1.0:
        raise DitAttnError(f"density is the share of key blocks kept per query block, in (0, 1], got {density}")
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise DitAttnError(f"top_p is a share of the softmax mass in (0, 1], got {top_p}")


@overload
def blocks_of_density(density: float, kv_blocks: int) -> int: ...
@overload
def blocks_of_density(density: Budget, kv_blocks: int) -> int | torch.Tensor: ...
def blocks_of_density(density: Budget, kv_blocks: int) -> int | torch.Tensor:
    """``ceil(density * nk)``; a little slack keeps a product like 0.07 * 100 = 7.000000000000001 from costing one.

    Of a tensor a 0-d int64 tensor; the slack covers the rounding of its type.
    """
    if isinstance(density, torch.Tensor):
        slack = max(1e-9, torch.finfo(density.dtype).eps * kv_blocks)
        return torch.ceil(density.double() * kv_blocks - slack).clamp(1, kv_blocks).long()
    return max(1, min(math.ceil(density * kv_blocks - 1e-9), kv_blocks))


# -- what a selection keeps --------------------------------------------------------------------------------------------


def block_probabilities(scores: torch.Tensor) -> torch.Tensor:
    """Softmax over the key blocks of scores (B, H, nq, nk), fp32; 0 in a row without a key."""
    return torch.softmax(scores.float(), -1).masked_fill(scores == float("-inf"), 0.0)


def kept_mass(scores: torch.Tensor, layout: BlockLayout) -> torch.Tensor:
    """(B, H, nq) fp32, share of the pooled softmax mass of scores (B, H, nq, nk) that lies in the chosen blocks."""
    mass = block_probabilities(scores)
    idx, valid = layout.kv_idx.long(), layout.valid()
    shape = (*mass.shape[:3], idx.shape[-1])
    chosen = mass.gather(-1, idx.clamp(0, mass.shape[-1] - 1).expand(shape))
    return chosen.masked_fill(~valid.expand(shape), 0.0).sum(-1)


def selected_bits(layout: BlockLayout) -> torch.Tensor:
    """(B|1, H|1, nq, ceil(nk / 32)) int32; bit ``j % 32`` of word ``j // 32`` is set where key block j is read."""
    return pack_bits(layout.block_mask())


def unpack_bits(bits: torch.Tensor, kv_blocks: int) -> torch.Tensor:
    """(..., nk) bool from (..., ceil(nk / 32)) int32, the inverse of :func:`selected_bits`."""
    return ((bits[..., None] >> torch.arange(32, device=bits.device)) & 1).flatten(-2)[..., :kv_blocks].bool()
