"""Estimate the error of sparse attention on sampled rows, for any number of layouts, without computing the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from dit_attn.kernels import BlockLayout
from dit_attn.kernels.device import full_precision
from dit_attn.processors.core import executor
from dit_attn.processors.core.call import AttentionCall, Request
from dit_attn.processors.core.token_permute import PermutedTokens, TokenPermutation

_LEAST, _MOST, _SHARE = 32, 256, 32  # sampled rows: a 32nd of the visual ones, within limits
_TILE = 16  # consecutive rows that the kernels of a GPU compute together
_TURN, _CYCLE = 648055, 1 << 20  # multiples of the golden section, modulo 1, as whole numbers


def sampled_places(call: AttentionCall, q_block: int, turn: int = 0) -> tuple[torch.Tensor, int]:
    """Choose rows to measure: spread evenly, aligned to no grid, and other ones each turn.

    Args:
        call: the attention call.
        q_block: tokens per query block.
        turn: number of the measurement.

    Returns:
        (n,) int64 places among the visual rows, and how many consecutive ones belong to the same query block.
    """
    visual = call.visual.stop - call.visual.start
    tile = _TILE if call.q.device.type == "cuda" and q_block % _TILE == 0 and visual >= _TILE else 1
    tiles = min(visual, max(_LEAST, min(_MOST, visual // _SHARE))) // tile
    numbers = torch.arange(turn * tiles, (turn + 1) * tiles, device=call.q.device)
    first = numbers * _TURN % _CYCLE * (visual // tile) // _CYCLE * tile
    return (first[:, None] + torch.arange(tile, device=first.device)).flatten(), tile


@torch.no_grad()
def sampled_errors(call: AttentionCall, requests: Sequence[Request], places: torch.Tensor, tile: int) -> torch.Tensor:
    """Return the relative L2 error of the sampled rows, (requests,) fp32; of the batch row where it is largest.

    Args:
        call: the attention call.
        requests: requests of one method that differ in the blocks they chose.
        places, tile: from :func:`sampled_places`; places of the order in which the blocks are cut.
    """
    sampled = [_of_rows(call, request, places, tile) for request in requests]
    rows = sampled[0].permuted
    assert rows is not None
    bias = sampled[0].bias(call.visual)
    bias = None if bias is None else rows.order.permute_bias(bias)
    dense = executor.dense_rows(call)(rows.q, rows.k, rows.v, executor.mask_of_keys(rows, rows.q.dtype), bias)
    exact = dense.to(torch.promote_types(dense.dtype, torch.float32))
    errors = []
    for request in sampled:
        with full_precision(exact.device):
            apart = (executor.visual_rows(call, request)[0].to(exact.dtype) - exact).flatten(1).norm(dim=1)
            errors.append((apart / exact.flatten(1).norm(dim=1).clamp(min=1e-30)).amax())
    return torch.stack(errors).float()


def _of_rows(call: AttentionCall, request: Request, places: torch.Tensor, tile: int) -> Request:
    """The request of some rows, in query blocks of their own."""
    assert request.layout is not None
    blocks = places[::tile] // request.layout.q_block
    rows = request.permuted or _in_order(call, request)
    order = rows.order
    order = replace(order, rows=places if order.rows is None else order.rows[places], inverse=None)
    end, fine = request.epilogue, request.fine
    if end is not None:
        scale, add = (None if x is None else x[:, :, blocks] for x in (end.row_scale, end.add))
        end = replace(end, row_scale=scale, add=add)
    if fine is not None:
        fine = replace(fine, layout=_lists_of(fine.layout, blocks, tile))
    return replace(
        request, layout=_lists_of(request.layout, blocks, tile), epilogue=end, fine=fine,
        permuted=replace(rows, q=rows.q[:, places], order=order),
    )  # fmt: skip


def _lists_of(layout: BlockLayout, blocks: torch.Tensor, tile: int) -> BlockLayout:
    """The lists of some query blocks, for a tile of rows of each."""
    lists, counts = layout.kv_indices[:, :, blocks], layout.kv_num_blocks[:, :, blocks]
    return BlockLayout(tile, layout.kv_block, tile * len(blocks), layout.kv_len, lists, counts, layout.uniform)


def _in_order(call: AttentionCall, request: Request) -> PermutedTokens:
    """The tensors of a call whose blocks are cut in the order of the sequence."""
    q = call.q[:, call.visual]
    nothing = torch.zeros(0, dtype=torch.bool, device=q.device)
    order = TokenPermutation((), None, None, None, q.shape[1], nothing)
    return PermutedTokens(q, call.k, call.v, request.key_mask, request.key_bias, order)
