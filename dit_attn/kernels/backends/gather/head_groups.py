"""Groups of heads of a call, one batch row each: what the gather backend copies and computes at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from dit_attn.kernels.backends.gather.key_blocks import KeyBlocks, blocks_in_place, copied_blocks
from dit_attn.kernels.backends.gather.workspace import Workspace
from dit_attn.kernels.device import chunk_sizes
from dit_attn.kernels.problem import LOG2E, NEG_INF, Problem

COPY_LIMIT = 0.25
"""Largest copy of one head's K and V, as a fraction of q, k, v and o; a larger one is not made."""
SIDE_BY_SIDE_LIMIT = 0.5
"""Largest copies of the heads that threads compute side by side, as a fraction of q, k, v and o: all of K and V."""


@dataclass(frozen=True)
class Precision:
    """The dtypes of a computation.

    Attributes:
        keys: of the product of q and k.
        logits: of the softmax.
        values: of the product of the probabilities and v.
    """

    keys: torch.dtype
    logits: torch.dtype
    values: torch.dtype


@dataclass(frozen=True)
class HeadGroup:
    """Key heads ``g0:g1`` of one batch row, in blocks.

    Attributes:
        batch, g0, g1: batch row and range of key heads.
        k, v: their blocks.
        bias: (heads|1, nk, kv_block) in base-2 units, ``-inf`` where there is no key; or ``None``.
        logits: dtype of the softmax.
        low_rank: (heads|1 * nk, kv_block * R), the key side of the low-rank bias; or ``None``.
    """

    batch: int
    g0: int
    g1: int
    k: KeyBlocks
    v: KeyBlocks
    bias: torch.Tensor | None
    logits: torch.dtype
    low_rank: torch.Tensor | None = None


@dataclass(frozen=True)
class HeadSplit:
    """How a call is split into groups of heads.

    Attributes:
        ranges: (batch row, first key head, last) of every group.
        masked: whether any key is masked.
        in_place: gather from k and v themselves, because the copy of one head would exceed ``COPY_LIMIT``.
        fits: whether one group for each thread fits the memory of a call.
    """

    ranges: tuple[tuple[int, int, int], ...]
    masked: bool
    in_place: bool
    fits: bool


def split_heads(
    problem: Problem, kind: Precision, threads: int = 1, allow_in_place: bool = False, room: float = 1.0
) -> HeadSplit:
    """Split a call into groups of as many heads as the chunk size allows, at least one for each thread if it has them.

    Args:
        problem: the call.
        kind: its dtypes.
        threads: how many compute groups side by side.
        allow_in_place: do not copy keys and values where the copy of a head would exceed ``COPY_LIMIT``.
        room: part of that limit which the caller leaves to copies.
    """
    q, k, v, layout = problem.q, problem.k, problem.v, problem.layout
    tokens = layout.nk * layout.kv_block
    per_head = tokens * (k.shape[-1] * kind.keys.itemsize + v.shape[-1] * kind.values.itemsize)
    queries = q.shape[1] * problem.ratio * (q.shape[-1] + v.shape[-1]) * q.itemsize
    limit, heads = chunk_sizes(k.device).group, k.shape[2]
    size = max(1, min(heads, limit // max(per_head, queries), k.shape[0] * heads // threads))
    inputs = q.shape[0] * heads * (queries + layout.kv_len * (k.shape[-1] + v.shape[-1]) * k.itemsize)
    large = problem.on_host and per_head > max(limit, room * COPY_LIMIT * inputs)
    key_mask = problem.key_mask
    return HeadSplit(
        ranges=tuple((b, g0, min(g0 + size, heads)) for b in range(k.shape[0]) for g0 in range(0, heads, size)),
        masked=key_mask is not None and not (problem.on_host and bool(key_mask.all())),
        in_place=allow_in_place and large and layout.kv_len >= layout.kv_block,
        fits=size * per_head * threads <= max(limit * threads, SIDE_BY_SIDE_LIMIT * inputs),
    )


def gather_heads(problem: Problem, kind: Precision, split: HeadSplit, index: int, workspace: Workspace) -> HeadGroup:
    """Return group ``index`` of a split call; its buffers in ``workspace`` are reused by the next group."""
    b, g0, g1 = split.ranges[index]
    layout = problem.layout
    mask = problem.key_mask[b] if split.masked and problem.key_mask is not None else None
    heads = slice(g0 * problem.ratio, g1 * problem.ratio)

    def blocks(x: torch.Tensor, dtype: torch.dtype, name: str) -> KeyBlocks:
        if split.in_place:
            return blocks_in_place(x, layout, mask, dtype)
        return copied_blocks(x, layout, mask, dtype, name, workspace)

    return HeadGroup(
        batch=b,
        g0=g0,
        g1=g1,
        k=blocks(problem.k[b, :, g0:g1], kind.keys, "group k"),
        v=blocks(problem.v[b, :, g0:g1], kind.values, "group v"),
        bias=_bias(problem, b, heads, mask, kind.logits),
        logits=kind.logits,
        low_rank=_low_rank(problem, b, heads, mask, kind.logits, workspace),
    )


def _low_rank(
    problem: Problem, b: int, heads: slice, mask: torch.Tensor | None, dtype: torch.dtype, workspace: Workspace
) -> torch.Tensor | None:
    """(heads|1 * nk, kv_block * R), the key side of the low-rank bias; ``None`` if there is none."""
    if problem.low_rank is None:
        return None
    k = problem.low_rank[1]
    k = k[b if k.shape[0] > 1 else 0]
    k = k[heads] if k.shape[0] > 1 else k
    return copied_blocks(k.transpose(0, 1), problem.layout, mask, dtype, "group rank", workspace).rows


def _bias(problem: Problem, b: int, heads: slice, mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """(heads|1, nk, kv_block) in base-2 units, ``-inf`` on keys that do not exist; ``None`` if nothing is added."""
    layout, bias = problem.layout, problem.key_bias
    if mask is None and bias is None:
        return None
    if bias is None:
        rows = torch.zeros(1, layout.kv_len, dtype=dtype, device=problem.q.device)
    else:
        rows = bias[b if bias.shape[0] > 1 else 0].to(dtype) * LOG2E
        rows = rows[heads] if bias.shape[1] > 1 else rows
    if mask is not None:
        rows = rows.masked_fill(~mask, NEG_INF)
    return F.pad(rows, (0, layout.nk * layout.kv_block - layout.kv_len), value=NEG_INF).unflatten(1, (layout.nk, -1))
