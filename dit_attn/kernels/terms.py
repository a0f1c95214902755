"""Optional terms of an attention call: a low-rank logit bias, compensation of skipped blocks, an epilogue.

For query n of query block i and key m::

    x_nm  = scale * q_n . k_m + key_bias_m + bias.q_n . bias.k_m                n attends to m
    x~_nj = scale * q_n . kbar_j + log_weight_j + bias.q_n . bias_j (+ variance) pooled key j of a block that i skips
    (a bias of at most BARRED is -inf: no weight, and a row with no other key is empty)
    lse_n = logsumexp over both;  Y_n = sum_m exp(x_nm - lse_n) v_m + sum_j exp(x~_nj - lse_n) vbar_j
    o_n   = (1 - blend_h) * (row_scale_i * Y_n * exp(min(lse_n - lse_ref_n, cap)) + add_i) + blend_h * v_n

A kernel may fuse all of it; ``backends.compose_terms`` computes the same, with gradients, around one that has no terms.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dit_attn.errors import DitAttnError
from dit_attn.kernels.checks import check_key_mask, check_sizes, check_tokens
from dit_attn.kernels.selection.pooling import block_counts, block_mean_squares, block_means

BARRED = -1e4
"""A low-rank bias of at most this is ``-inf``: the query does not attend to the key."""
BAR = -1e8
"""Factor that bars: it stays below :data:`BARRED` times the 1/1024 that a mean of a thousand factors may make of 1."""


@dataclass(frozen=True)
class LogitBias:
    """A low-rank bias of the logits, ``bias.q @ bias.k^T``; exact in any fused kernel.

    Attributes:
        q: (B|1, H|1, Sq, R).
        k: (B|1, H|1, Sk, R), natural logarithm. Factors are finite, as 0 times ``-inf`` is NaN: bar a query from a key
            by :data:`BAR` in one factor and 1 in the other.
    """

    q: torch.Tensor
    k: torch.Tensor


@dataclass(frozen=True)
class Compensation:
    """Pooled or sampled keys that stand for the keys of skipped blocks, inside the same softmax.

    Attributes:
        k: (B, Hk, nv, D), mean of every ``tokens`` keys, or one of them.
        v: (B, Hk, nv, D), mean of their values, or the value of that one.
        log_weight: (B|1, H|1, nv) fp32, natural logarithm of how many keys each one stands for; ``-inf`` for none.
        tokens: keys per pooled key; divides the layout's ``kv_block``.
        variance: (B, Hk, nv, D) per-channel variance of the keys, for the second-order term
            ``0.5 scale^2 sum_c q_c^2 variance_c``; ``None`` leaves it out.
        cap: upper bound of that term.
        bias: (B|1, H|1, nv, R) factor of the call's :class:`LogitBias` for the pooled keys, see :func:`pooled_bias`;
            ``None`` leaves them without a bias.
        left_out: (B|1, H|1, nq, nk) bool, skipped key blocks whose pooled keys do not count either; ``None`` for none.
        first_order: (B, Hk, D, D) covariance of keys and values behind a pooled key, see :func:`key_value_covariance`:
            a row gets ``scale * q . first_order`` besides, times its weight of all pooled keys; ``None`` leaves it out.
    """

    k: torch.Tensor
    v: torch.Tensor
    log_weight: torch.Tensor
    tokens: int
    variance: torch.Tensor | None = None
    cap: float = 2.0
    bias: torch.Tensor | None = None
    left_out: torch.Tensor | None = None
    first_order: torch.Tensor | None = None

    @property
    def is_fused(self) -> bool:
        """Whether the kernels compute all of it; what they lack is composed around them."""
        return self.left_out is None and self.first_order is None


@dataclass(frozen=True)
class Epilogue:
    """Operations on the rows of the output, in this order, before they are written.

    Attributes:
        row_scale: (B|1, H|1, nq) fp32, factor per query block.
        lse_ref: (B, H, Sq) fp32, natural logarithm of a denominator to divide by instead of the row's own.
        cap: upper bound of ``lse - lse_ref``.
        add: (B|1, H|1, nq, D), added per query block.
        blend: (B|1, H) fp32 in [0, 1], weight of the query's own value; with 1 the head returns that value, attends
            to no key, and its log-sum-exp is ``-inf``.
        value_shift: query n's own value is row ``n + value_shift`` of v.
    """

    row_scale: torch.Tensor | None = None
    lse_ref: torch.Tensor | None = None
    cap: float = 20.0
    add: torch.Tensor | None = None
    blend: torch.Tensor | None = None
    value_shift: int = 0


@dataclass(frozen=True)
class Terms:
    """All optional terms of an attention call.

    Attributes:
        key_lengths: (B,) int32, keys of each sample that exist, counted from the first.
        bias, compensation, epilogue: see the classes.
    """

    key_lengths: torch.Tensor | None = None
    bias: LogitBias | None = None
    compensation: Compensation | None = None
    epilogue: Epilogue | None = None

    def __bool__(self) -> bool:
        return self != NO_TERMS

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Terms):
            return NotImplemented
        names = ("key_lengths", "bias", "compensation", "epilogue")
        return all(getattr(self, name) is getattr(other, name) for name in names)

    __hash__ = None  # type: ignore[assignment]


NO_TERMS = Terms()


def pooled_compensation(
    k: torch.Tensor,
    v: torch.Tensor,
    tokens: int,
    *,
    key_mask: torch.Tensor | None = None,
    variance: bool = False,
) -> Compensation:
    """Pool every ``tokens`` keys and values into one, to compensate for skipped blocks.

    Args:
        k, v: (B, Sk, Hk, D).
        tokens: keys per pooled key. Fewer than the selection block is better: errors fall faster than cost rises.
        key_mask: (B, Sk) bool, keys that exist; only they are averaged and counted.
        variance: also compute the per-channel variance of the keys.

    Raises:
        DitAttnError: ``k``, ``v`` or ``key_mask`` do not fit together, or ``tokens`` is below 1.
    """
    _check_compensation(k, v, tokens, key_mask)
    mean = block_means(k, tokens, key_mask)
    log_weight = torch.log(block_counts(k, tokens, key_mask))
    per_channel = None
    if variance:
        square = block_mean_squares(k, tokens, key_mask)
        largest = min(torch.finfo(x.dtype).max for x in (square, k))
        per_channel = (square - mean.square()).clamp(0.0, largest).to(k.dtype)
    return Compensation(mean.to(k.dtype), block_means(v, tokens, key_mask).to(v.dtype), log_weight, tokens, per_channel)


def key_value_covariance(
    k: torch.Tensor, v: torch.Tensor, tokens: int, *, key_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Compute the mean covariance of keys and values within groups of tokens, for the first-order term of PISA.

    To first order in the distance of a key to its mean, ``sum_t exp(q.k_t) v_t`` of a group is ``n exp(q.kbar)
    (vbar + q C)``; the covariance C is taken for that of all groups (arXiv 2602.01077).

    Args:
        k, v: (B, Sk, Hk, D).
        tokens: keys per group.
        key_mask: (B, Sk) bool, keys that exist.

    Returns:
        (B, Hk, D, D) fp32.

    Raises:
        DitAttnError: ``k``, ``v`` or ``key_mask`` do not fit together, or ``tokens`` is below 1.
    """
    _check_compensation(k, v, tokens, key_mask)
    deviations = []
    for x in (k, v):
        means = block_means(x, tokens, key_mask).transpose(1, 2).repeat_interleave(tokens, 1)[:, : x.shape[1]]
        apart = x.float() - means
        deviations.append(apart if key_mask is None else apart.masked_fill(~key_mask[:, :, None, None], 0.0))
    count = block_counts(k, tokens, key_mask).sum(-1)[..., None, None].clamp(min=1.0)
    return torch.einsum("bshd,bshe->bhde", *deviations) / count


def sampled_compensation(
    k: torch.Tensor,
    v: torch.Tensor,
    tokens: int,
    places: torch.Tensor,
    *,
    key_mask: torch.Tensor | None = None,
) -> Compensation:
    """Let one of every ``tokens`` keys, and its value, stand for all of them, to compensate for skipped blocks.

    Over all places the softmax's sums over skipped keys average to those of dense attention: with each place taken
    once, the outputs merged by their log-sum-exp are dense attention. A mean of keys has no such property.

    Args:
        k, v: (B, Sk, Hk, D).
        tokens: keys that each sampled key stands for.
        places: (Hk,) int64, which of them is taken, for every head of k: modulo the number of those that exist.
        key_mask: (B, Sk) bool, keys that exist; only they are taken and counted.

    Raises:
        DitAttnError: ``k``, ``v``, ``places`` or ``key_mask`` do not fit together, or ``tokens`` is below 1.
    """
    _check_compensation(k, v, tokens, key_mask)
    (_, seq, heads, dim), device = k.shape, k.device
    if places.shape != (heads,) or places.dtype != torch.int64:
        raise DitAttnError(f"places must be ({heads},) int64, one for each head, got {tuple(places.shape)}")
    counts = block_counts(k, tokens, key_mask)
    first = torch.arange(0, seq, tokens, device=device)
    index = places.to(device)[:, None] % counts.clamp(min=1.0).long()
    if key_mask is not None:  # the keys that exist first
        exists = torch.nn.functional.pad(key_mask, (0, -seq % tokens)).unflatten(1, (-1, tokens))
        present = (~exists).to(torch.uint8).argsort(dim=-1, stable=True)
        index = present.gather(2, index.transpose(1, 2)).transpose(1, 2)
    index = (first + index)[..., None].expand(k.shape[0], heads, -1, dim)
    keys, values = (x.transpose(1, 2).gather(2, index) for x in (k, v))
    return Compensation(keys, values, torch.log(counts), tokens)


def _check_compensation(k: torch.Tensor, v: torch.Tensor, tokens: int, key_mask: torch.Tensor | None) -> None:
    check_sizes(tokens=tokens)
    check_tokens("k", k)
    if k.shape != v.shape:
        raise DitAttnError(f"k {tuple(k.shape)} and v {tuple(v.shape)} must be of one shape; pass matching tensors")
    check_tokens("v", v)
    check_key_mask(k, key_mask)


def pooled_bias(k: torch.Tensor, tokens: int, key_mask: torch.Tensor | None = None) -> torch.Tensor:
    """Pool the key factor of a :class:`LogitBias` for pooled keys: the mean over the keys of each that exist.

    To first order the bias of a pooled key is that of its keys, as its logit is. A query that is barred from one of
    the keys is barred from the pooled key, which would pass on its value.

    Args:
        k: (B|1, H|1, Sk, R).
        tokens: keys per pooled key, at most 1024.
        key_mask: (B, Sk) bool, keys that exist.

    Returns:
        (B|1, H|1, nv, R).
    """
    k = k if key_mask is None else k.expand(key_mask.shape[0], -1, -1, -1)
    return block_means(k.transpose(1, 2), tokens, key_mask)
