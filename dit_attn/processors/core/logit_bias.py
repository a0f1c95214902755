"""Logit biases that methods request: factors of rows and keys, and spans that are lifted, lowered or barred.

A bias is the product of a factor per row and a factor per key, so that no S x S matrix is ever built; ranks add up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dit_attn.errors import DitAttnError
from dit_attn.kernels import LogitBias
from dit_attn.kernels.terms import BAR

TokenSet = slice | torch.Tensor
"""Tokens of a sequence: a slice, or (S,) or (B, S) bool."""


@dataclass(frozen=True)
class RowBias:
    """A low-rank bias of consecutive rows.

    Attributes:
        rows: (B|1, H|1, n, r) factor of the rows ``first`` to ``first + n - 1``.
        keys: (B|1, H|1, Sk, r) factor of all keys.
        first: the first row.
    """

    rows: torch.Tensor
    keys: torch.Tensor
    first: int

    @property
    def last(self) -> int:
        """One past the last row."""
        return self.first + self.rows.shape[2]


def factor_bias(
    q: torch.Tensor,
    k: torch.Tensor,
    rows: torch.Tensor,
    keys: torch.Tensor,
    first: int,
    shard: tuple[int, int] = (0, 1),
) -> RowBias | None:
    """Return a bias from its factors, ``None`` where it is zero.

    Args:
        q: (B, S, H, D) queries of the call.
        k: (B, Sk, Hk, D) its keys.
        rows: (B|1, H|1, n, r), finite.
        keys: (B|1, H|1 or Hk, Sk, r), finite.
        first: the first of the n rows.
        shard: rank and number of the devices that share the heads; factors for the heads of all are cut to those here.
            Where the heads of ``keys`` can be either, they are what those of ``rows`` are. All devices must agree on
            whether there is a bias, so one that is zero for the heads here is kept.

    Raises:
        DitAttnError: a factor does not fit the call.
    """
    batch, seq_len, heads, _ = q.shape
    keys = _own_key_heads(rows, keys, heads, k.shape[2], shard)
    rows = _own_heads(rows, (heads,), shard)
    given = (("rows", rows, {1, heads}), ("keys", keys, {1, heads, k.shape[2]}))
    for name, x, head_sizes in given:
        if x.ndim != 4 or x.shape[0] not in (1, batch) or x.shape[1] not in head_sizes or not x.is_floating_point():
            raise DitAttnError(
                f"the {name} of a bias must be floats (B|1, H|1, tokens, r) with B={batch}, H={heads}, got "
                f"{tuple(x.shape)}; the heads are those of this device"
            )
    if not 0 <= first <= first + rows.shape[2] <= seq_len or keys.shape[2:] != (k.shape[1], rows.shape[3]):
        raise DitAttnError(
            f"a bias of rows {first} to {first + rows.shape[2]} and keys {tuple(keys.shape[2:])} does not fit "
            f"{seq_len} tokens and {k.shape[1]} keys; keys need a factor for every key and as many columns as rows"
        )
    if shard[1] == 1 and (_is_zero(rows) or _is_zero(keys)):
        return None
    if keys.shape[1] not in (1, heads):
        keys = keys.repeat_interleave(heads // k.shape[2], 1)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    rows, keys = (x.to(q.device, dtype) for x in (rows, keys))
    return RowBias(rows, keys, first)


def span_bias(
    q: torch.Tensor,
    k: torch.Tensor,
    rows: TokenSet,
    keys: TokenSet,
    value: float | torch.Tensor,
    shard: tuple[int, int] = (0, 1),
) -> RowBias | None:
    """Return a constant bias between rows and keys, ``None`` where it is zero or has no row or key.

    Args:
        q: (B, S, H, D) queries of the call.
        k: (B, Sk, Hk, D) its keys.
        rows, keys: the tokens.
        value: natural logarithm, ``-inf`` to bar; a number or (B|1, H|1).
        shard: as for :func:`factor_bias`; a number is the same on all devices.

    Raises:
        DitAttnError: a value is NaN or ``inf``, or something does not fit the call.
    """
    batch, seq_len, heads, _ = q.shape
    kept = shard[1] > 1 and isinstance(value, torch.Tensor)
    if not isinstance(value, torch.Tensor):
        value = torch.tensor([[float(value)]], dtype=torch.float64)
    value = _own_heads(value, (heads,), shard)
    if value.ndim != 2 or value.shape[0] not in (1, batch) or value.shape[1] not in (1, heads):
        raise DitAttnError(
            f"the value of a bias must be a number or (B|1, H|1) with B={batch}, H={heads}, got {tuple(value.shape)}"
        )
    if bool((value.isnan() | (value == math.inf)).any()):
        raise DitAttnError("the value of a bias must be finite or -inf; to attend to nothing else, bar the other keys")
    chosen = [token_mask(x, batch, length) for x, length in ((rows, seq_len), (keys, k.shape[1]))]
    any_row = chosen[0].any(0).nonzero()
    if (_is_zero(value) and not kept) or not len(any_row) or not chosen[1].any():
        return None
    first, last = int(any_row[0]), int(any_row[-1]) + 1
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    amount, row, key = (x.to(q.device, dtype) for x in (value, chosen[0][:, first:last], chosen[1]))
    return RowBias(row[:, None, :, None] * amount.clamp(min=BAR)[..., None, None], key[:, None, :, None], first)


def _is_zero(x: torch.Tensor) -> bool:
    """Whether a factor adds nothing; one that is being learned does, as it may start at 0."""
    return not (torch.is_grad_enabled() and x.requires_grad) and not bool(x.any())


def token_mask(tokens: TokenSet, batch: int, seq_len: int) -> torch.Tensor:
    """Return tokens of a sequence as (B|1, S) bool.

    Raises:
        DitAttnError: they are neither a slice nor bool (S,) or (B, S).
    """
    if isinstance(tokens, slice):
        mask = torch.zeros(1, seq_len, dtype=torch.bool)
        mask[:, tokens] = True
        return mask
    mask = tokens[None] if tokens.ndim == 1 else tokens
    if mask.dtype != torch.bool or mask.shape not in ((1, seq_len), (batch, seq_len)):
        raise DitAttnError(
            f"tokens must be a slice, or bool (S,) or (B, S) with B={batch}, S={seq_len}, got {tuple(tokens.shape)} "
            f"{tokens.dtype}"
        )
    return mask


def _own_heads(x: torch.Tensor, heads: tuple[int, ...], shard: tuple[int, int]) -> torch.Tensor:
    """A factor of this device's heads, its second axis, where it has those of all devices."""
    rank, world = shard
    count = next((n for n in heads if x.ndim > 1 and x.shape[1] == n * world and x.shape[1] not in (1, *heads)), None)
    return x if count is None else x.narrow(1, rank * count, count)


def _own_key_heads(
    rows: torch.Tensor, keys: torch.Tensor, heads: int, key_heads: int, shard: tuple[int, int]
) -> torch.Tensor:
    """:func:`_own_heads` of a factor of keys, of query heads or of key heads, those of this device or of all.

    Raises:
        DitAttnError: its heads are as many as the query heads here and the key heads of all, and ``rows`` do not tell.
    """
    world = shard[1]
    if keys.ndim < 2 or keys.shape[1] != heads or not 1 < heads == key_heads * world:
        return _own_heads(keys, (heads, key_heads), shard)
    given = rows.shape[1] if rows.ndim > 1 else 1
    if given == 1:
        raise DitAttnError(
            f"a bias whose keys have {heads} heads fits the query heads of this device and the key heads of the model; "
            f"give keys of the model's {heads * world} query heads, or rows with heads"
        )
    return keys if given == heads else keys.narrow(1, shard[0] * key_heads, key_heads)


def merged_bias(biases: Sequence[RowBias], first: int, last: int) -> LogitBias | None:
    """Return the sum of the biases for the rows ``first`` to ``last - 1``, ``None`` where none reaches them."""
    here = [bias for bias in biases if bias.first < last and bias.last > first]
    if not here:
        return None
    rows = []
    for bias in here:
        low, high = max(bias.first, first), min(bias.last, last)
        some = bias.rows[:, :, low - bias.first : high - bias.first]
        rows.append(torch.nn.functional.pad(some, (0, 0, low - first, last - high)))
    return LogitBias(_columns(rows), _columns([bias.keys for bias in here]))


def _columns(factors: Sequence[torch.Tensor]) -> torch.Tensor:
    """(B|1, H|1, Sk, R): the columns of all factors."""
    sizes = [max(x.shape[axis] for x in factors) for axis in (0, 1)]
    return torch.cat([x.expand(*sizes, -1, -1) for x in factors], -1)
