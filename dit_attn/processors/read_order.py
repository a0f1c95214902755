"""The order in which a reader sees a sequence: the picture along a curve first, then everything else.

Attention does not care for the order of its tokens; blocks do. Along a curve a block is a compact piece of the clip,
and with the text behind it no block of keys but one mixes picture and text. Rotary embedding is applied before, so the
tokens carry their positions with them; the rows of the result are put back where they were.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from dit_attn.kernels.kept import kept
from dit_attn.kernels.layout import ceil_div
from dit_attn.kernels.reorder import TokenOrder, block_neighbours, token_order
from dit_attn.processors.tokens import Tokens

if TYPE_CHECKING:
    from dit_attn.processors.executor import AttentionCall, Request

Grid = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class ReadOrder:
    """Where the tokens of a sequence stand for a reader.

    Attributes:
        parts: order of each visual span.
        rows: (Sv,) int64, visual token (counted from the first one) at each place; ``None`` when none moves.
        undo: (Sv,) int64, the inverse.
        keys: (S,) int64, token of the sequence at each place, the visual ones first; ``None`` when none moves.
        visual: number of visual tokens Sv.
        first_frame: (Sv,) bool by place, tokens of the first frame of a clip.
    """

    parts: tuple[TokenOrder, ...]
    rows: torch.Tensor | None
    undo: torch.Tensor | None
    keys: torch.Tensor | None
    visual: int
    first_frame: torch.Tensor

    def forced(self, keep: tuple[str, ...], seq_len: int, q_block: int, kv_block: int) -> torch.Tensor:
        """Blocks that every selection must contain.

        Args:
            keep: any of ``diagonal``, ``neighbours`` (of 26 of each token, itself among them) and ``first-frame``;
                blocks with a token that is not visual are always kept.
            seq_len: tokens of the sequence.
            q_block, kv_block: tokens per block.

        Returns:
            (1, 1, nq, nk) bool.
        """
        device, nq = self.first_frame.device, ceil_div(self.visual, q_block)
        lows = torch.arange(ceil_div(seq_len, kv_block), device=device) * kv_block
        other = (lows + kv_block).clamp(max=seq_len) > self.visual
        kept = other.expand(nq, -1).clone()
        if "neighbours" in keep:
            kept[:, : ceil_div(self.visual, kv_block)] |= block_neighbours(
                *self.parts, block=q_block, kv_block=kv_block
            )
        elif "diagonal" in keep:
            rows = torch.arange(nq, device=device)[:, None] * q_block
            kept |= (lows < rows + q_block) & (lows + kv_block > rows)
        if "first-frame" in keep:
            kept[:, self.first_frame.nonzero()[:, 0] // kv_block] = True
        return kept[None, None]


@dataclass(frozen=True)
class Rows:
    """One call's tensors in read order.

    Attributes:
        q: (B, Sv, H, D) visual queries.
        k, v: (B, S, Hk, D), visual keys first.
        key_mask: (B, S) bool, or ``None``.
        key_bias: (B|1, H|1, S) fp32, or ``None``.
        order: to put the result back.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    key_mask: torch.Tensor | None
    key_bias: torch.Tensor | None
    order: ReadOrder

    def put_back(self, out: torch.Tensor) -> torch.Tensor:
        """Rows (B, Sv, H, Dv) of the result where they were in the sequence."""
        return out if self.order.undo is None else out.index_select(1, self.order.undo)


def read_in_order(call: AttentionCall, request: Request, name: str, tile: Grid | None = None) -> Rows:
    """The tensors of ``call`` in the order ``name`` (of ``ORDERS``, or ``none``); ``request`` keeps them."""
    assert call.tokens is not None and call.tokens.visual_range is not None
    order = read_order(call.tokens, name, tile, call.q.device)
    start, stop = call.tokens.visual_range
    q = call.q[:, start:stop]
    rows = Rows(
        q if order.rows is None else q.index_select(1, order.rows),
        call.k, call.v, request.key_mask, request.key_bias, order,
    )  # fmt: skip
    if order.keys is not None:
        keys = order.keys
        rows = replace(
            rows,
            k=rows.k.index_select(1, keys),
            v=rows.v.index_select(1, keys),
            key_mask=None if rows.key_mask is None else rows.key_mask.index_select(1, keys),
            key_bias=None if rows.key_bias is None else rows.key_bias.index_select(2, keys),
        )
    request.rows = rows
    return rows


@kept
def read_order(tokens: Tokens, name: str, tile: Grid | None, device: torch.device) -> ReadOrder:
    """The order of a sequence; kept for the next call with the same arguments.

    Args:
        tokens: the resolved sequence, its visual tokens consecutive.
        name: of :data:`~dit_attn.kernels.reorder.ORDERS`, or ``none`` (as they are).
        tile: (t, h, w) of ``tiles``.
        device: where it lives.
    """
    assert tokens.visual_range is not None
    start, stop = tokens.visual_range
    label = "identity" if name == "none" else name
    parts = tuple(
        token_order(label, span.grid or (1, 1, span.length or 0), tile=tile, device=device) for span in tokens.visual
    )
    rows = torch.cat([part.order + span.start - start for part, span in zip(parts, tokens.visual)])
    undo = torch.argsort(rows)
    everything = torch.arange(tokens.seq_len, device=device)
    keys = torch.cat([rows + start, everything[:start], everything[stop:]])
    first = torch.zeros(stop - start, dtype=torch.bool, device=device)
    for span in tokens.visual:
        if span.kind == "video" and span.grid is not None:
            low = span.start - start
            first[low : low + span.grid[1] * span.grid[2]] = True
    moves = label != "identity"
    return ReadOrder(
        parts,
        rows if moves else None,
        undo if moves else None,
        keys if moves or start else None,
        stop - start,
        first[rows],
    )
