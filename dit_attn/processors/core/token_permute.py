"""Reorder the tokens of a sequence for block-sparse attention: visual tokens along a curve first, then all others.

Attention does not depend on the order of its tokens, but blocks do. Along a space-filling curve a block is a compact
region of the image or video, and with the text behind the visual tokens at most one key block mixes the two. Rotary
embedding is applied before, so the tokens carry their positions with them; the result is put back in its order.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from dit_attn.kernels import LogitBias
from dit_attn.kernels.layouts.block_layout import ceil_div
from dit_attn.kernels.layouts.cache import cached
from dit_attn.kernels.layouts.token_order import TokenOrder, block_neighbors, token_order
from dit_attn.processors.core.tokens import Tokens

Grid = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class TokenPermutation:
    """Position of every token of a sequence after reordering.

    Attributes:
        parts: order of each visual span.
        rows: (Sv,) int64, visual token (counted from the first one) at each position; ``None`` for the identity.
        inverse: (Sv,) int64, the inverse of ``rows``.
        keys: (S,) int64, token of the sequence at each position, the visual ones first; ``None`` for the identity.
        visual: number of visual tokens Sv.
        first_frame: (Sv,) bool by position, tokens of the first frame of a video.
    """

    parts: tuple[TokenOrder, ...]
    rows: torch.Tensor | None
    inverse: torch.Tensor | None
    keys: torch.Tensor | None
    visual: int
    first_frame: torch.Tensor

    def permute_keys(self, x: torch.Tensor) -> torch.Tensor:
        """Return keys or values (B, S, Hk, D) in this order."""
        return x if self.keys is None else x.index_select(1, self.keys)

    def permute_bias(self, bias: LogitBias) -> LogitBias:
        """Return a bias of the visual rows in this order."""
        q = bias.q if self.rows is None else bias.q.index_select(2, self.rows)
        return LogitBias(q, bias.k if self.keys is None else bias.k.index_select(2, self.keys))

    def forced(
        self, keep: tuple[str, ...], seq_len: int, q_block: int, kv_block: int, others: bool = True
    ) -> torch.Tensor:
        """Return the blocks that every selection must contain.

        Args:
            keep: any of ``diagonal``, ``neighbors`` (the 26 of each token, and itself) and ``first-frame``.
            seq_len: tokens of the sequence.
            q_block, kv_block: tokens per block.
            others: whether blocks with a token that is not visual are forced.

        Returns:
            (1, 1, nq, nk) bool.
        """
        device, nq = self.first_frame.device, ceil_div(self.visual, q_block)
        starts = torch.arange(ceil_div(seq_len, kv_block), device=device) * kv_block
        not_visual = (starts + kv_block).clamp(max=seq_len) > self.visual
        forced = (not_visual & others).expand(nq, -1).clone()
        if "neighbors" in keep:
            forced[:, : ceil_div(self.visual, kv_block)] |= block_neighbors(
                *self.parts, block=q_block, kv_block=kv_block
            )
        elif "diagonal" in keep:
            rows = torch.arange(nq, device=device)[:, None] * q_block
            forced |= (starts < rows + q_block) & (starts + kv_block > rows)
        if "first-frame" in keep:
            forced[:, self.first_frame.nonzero()[:, 0] // kv_block] = True
        return forced[None, None]


@dataclass(frozen=True)
class PermutedTokens:
    """The tensors of one call in another token order.

    Attributes:
        q: (B, Sv, H, D) visual queries.
        k: (B, S, Hk, D), visual keys first.
        v: (B, S, Hk, Dv), visual values first.
        key_mask: (B, S) bool, or ``None``.
        key_bias: (B|1, H|1, S) fp32, or ``None``.
        order: the permutation.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    key_mask: torch.Tensor | None
    key_bias: torch.Tensor | None
    order: TokenPermutation

    def unpermute(self, out: torch.Tensor) -> torch.Tensor:
        """Return the rows (B, Sv, H, Dv) of a result in the order of the sequence."""
        return out if self.order.inverse is None else out.index_select(1, self.order.inverse)


def permute_tokens(
    tokens: Tokens,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_mask: torch.Tensor | None,
    key_bias: torch.Tensor | None,
    name: str,
    tile: Grid | None = None,
) -> PermutedTokens:
    """Reorder the tensors of a call.

    Args:
        tokens: the resolved sequence, its visual tokens consecutive.
        q: (B, Sv, H, D) visual queries.
        k: (B, S, Hk, D).
        v: (B, S, Hk, Dv).
        key_mask: (B, S) bool, or ``None``.
        key_bias: (B|1, H|1, S) fp32, or ``None``.
        name: one of :data:`~dit_attn.kernels.layouts.token_order.ORDERS`, or ``"none"`` (visual tokens first).
        tile: (t, h, w) tokens of a box of the order ``tiles``.
    """
    order = token_permutation(tokens, name, tile, q.device)
    q = q if order.rows is None else q.index_select(1, order.rows)
    permuted = PermutedTokens(q, k, v, key_mask, key_bias, order)
    if order.keys is None:
        return permuted
    return replace(
        permuted,
        k=k.index_select(1, order.keys),
        v=v.index_select(1, order.keys),
        key_mask=None if key_mask is None else key_mask.index_select(1, order.keys),
        key_bias=None if key_bias is None else key_bias.index_select(2, order.keys),
    )


@cached
def token_permutation(tokens: Tokens, name: str, tile: Grid | None, device: torch.device) -> TokenPermutation:
    """Return the permutation of a sequence; cached for the next call with the same arguments.

    Args:
        tokens: the resolved sequence, its visual tokens consecutive.
        name: one of :data:`~dit_attn.kernels.layouts.token_order.ORDERS`, or ``"none"`` (as they are).
        tile: (t, h, w) of ``tiles``.
        device: device of its tensors.
    """
    assert tokens.visual_range is not None
    start, stop = tokens.visual_range
    label = "identity" if name == "none" else name
    parts = tuple(
        token_order(label, span.grid or (1, 1, span.length or 0), tile=tile, device=device) for span in tokens.visual
    )
    rows = torch.cat([part.order + span.start - start for part, span in zip(parts, tokens.visual)])
    inverse = torch.argsort(rows)
    everything = torch.arange(tokens.seq_len, device=device)
    keys = torch.cat([rows + start, everything[:start], everything[stop:]])
    first = torch.zeros(stop - start, dtype=torch.bool, device=device)
    for span in tokens.visual:
        if span.kind == "video" and span.grid is not None:
            low = span.start - start
            first[low : low + span.grid[1] * span.grid[2]] = True
    moves = label != "identity"
    return TokenPermutation(
        parts,
        rows if moves else None,
        inverse if moves else None,
        keys if moves or start else None,
        stop - start,
        first[rows],
    )


def forced_blocks(
    tokens: Tokens, keep: tuple[str, ...], q_block: int, kv_block: int, device: torch.device
) -> torch.Tensor | None:
    """Return the blocks that every selection in the order of the sequence must contain.

    Args:
        tokens: the resolved sequence; queries are its visual rows, keys all of it.
        keep: any of ``text`` (every token that is not visual), ``first-frame``, ``diagonal``.
        q_block: tokens per query block.
        kv_block: tokens per key block.
        device: device of the mask.

    Returns:
        (1, 1, nq, nk) bool, or ``None`` when nothing is forced.
    """
    if not keep:
        return None
    assert tokens.visual_range is not None
    start, stop = tokens.visual_range
    nk = ceil_div(tokens.seq_len, kv_block)
    nq = ceil_div(stop - start, q_block)
    starts = torch.arange(nk, device=device) * kv_block
    stops = (starts + kv_block).clamp(max=tokens.seq_len)
    columns = torch.zeros(nk, dtype=torch.bool, device=device)
    if "text" in keep:
        columns |= (starts < start) | (stops > stop)
    if "first-frame" in keep:
        for span in tokens.visual:
            if span.kind == "video" and span.grid is not None:
                frame_end = span.start + span.grid[1] * span.grid[2]
                columns |= (starts < frame_end) & (stops > span.start)
    forced = columns.expand(nq, nk).clone()
    if "diagonal" in keep:
        rows = start + torch.arange(nq, device=device) * q_block
        row_ends = (rows + q_block).clamp(max=stop)
        forced |= (starts[None] < row_ends[:, None]) & (stops[None] > rows[:, None])
    return forced[None, None]
