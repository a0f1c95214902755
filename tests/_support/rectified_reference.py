"""The equations of Rectified SpaAttn and of merging, term by term in float64 over the whole map."""

from __future__ import annotations

import torch

from dit_attn import RectifiedSpaAttn
from dit_attn.kernels.layouts.block_layout import BlockLayout
from dit_attn.kernels.layouts.token_order import token_order
from dit_attn.processors.core.call import AttentionCall

NONE = float("-inf")


class Setup:
    """One batch row and head of a call, picture first and along the method's curve.

    Attributes:
        q: (Sv, D).
        k, v: (S, D).
        logits: (Sv, S), with the model's mask.
        exists: (S,) bool.
        undo: where each row of q was among the picture's tokens.
    """

    def __init__(self, call: AttentionCall, method: RectifiedSpaAttn, batch: int, head: int) -> None:
        tokens = call.tokens
        assert tokens is not None and tokens.visual_range is not None
        start, stop = tokens.visual_range
        chosen, tile = method.token_order(tokens)
        name = "identity" if chosen == "none" else chosen
        places = []
        for span in tokens.visual:
            assert span.grid is not None
            order = token_order(name, span.grid, tile=tile).order
            places.append(order + span.start)
        picture = torch.cat(places)
        rest = torch.tensor([i for i in range(tokens.seq_len) if not start <= i < stop], dtype=torch.long)
        keys = torch.cat([picture, rest])
        group = call.q.shape[2] // call.k.shape[2]
        self.q = call.q[batch, picture, head].double()
        self.k = call.k[batch, keys, head // group].double()
        self.v = call.v[batch, keys, head // group].double()
        self.scale = call.scale if call.scale is not None else call.q.shape[-1] ** -0.5
        self.added = torch.zeros(tokens.seq_len, dtype=torch.float64)
        if call.mask is not None:
            mask = call.mask[:, None, None, :] if call.mask.ndim == 2 else call.mask
            row = mask[min(batch, mask.shape[0] - 1), min(head, mask.shape[1] - 1), -1 if mask.shape[2] == 1 else start]
            self.added = torch.where(row, 0.0, NONE).double() if row.dtype == torch.bool else row.double()
        self.added = self.added[keys]
        self.exists = self.added > -1e30
        self.logits = self.q @ self.k.T * self.scale + self.added
        self.undo = torch.argsort(picture)
        self.visual = stop - start


def pools(x: torch.Tensor, block: int, exists: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean, mean absolute deviation and count of the existing tokens of every block of x (S, D)."""
    means, spreads, counts = [], [], []
    for low in range(0, len(x), block):
        part = x[low : low + block][exists[low : low + block]]
        mean = part.mean(0) if len(part) else torch.zeros_like(x[0])
        means.append(mean)
        spreads.append((part - mean).abs().mean(0) if len(part) else mean)
        counts.append(float(len(part)))
    return torch.stack(means), torch.stack(spreads), torch.tensor(counts, dtype=torch.float64)


def pooled_map(setup: Setup, method: RectifiedSpaAttn) -> torch.Tensor:
    """(nq, nk) the pooled map: blocks of picture by their means and counts, blocks with other tokens token by token."""
    q, _, _ = pools(setup.q, method.q_block, torch.ones(len(setup.q), dtype=torch.bool))
    k, _, count = pools(setup.k, method.kv_block, setup.exists)
    logits = q @ k.T * setup.scale + count.log()
    if len(setup.k) > setup.visual:
        for block in range(setup.visual // method.kv_block, len(k)):
            low, high = block * method.kv_block, (block + 1) * method.kv_block
            logits[:, block] = (q @ setup.k[low:high].T * setup.scale + setup.added[low:high]).logsumexp(-1)
    return torch.softmax(logits, -1).nan_to_num(0.0)


def rectified(
    call: AttentionCall, method: RectifiedSpaAttn, layout: BlockLayout, fine: BlockLayout | None = None
) -> torch.Tensor:
    """(B, Sv, H, D) float64: what the method must give for the blocks of ``layout``, and for ``fine`` by finer keys."""
    batches, _, heads, width = call.q.shape
    out = []
    blocks = layout.block_mask().expand(batches, heads, -1, -1)
    finer = torch.zeros_like(blocks) if fine is None else fine.block_mask().expand(batches, heads, -1, -1)
    for batch in range(batches):
        for head in range(heads):
            setup = Setup(call, method, batch, head)
            out.append(_one_head(setup, method, blocks[batch, head], finer[batch, head])[setup.undo])
    stacked = torch.stack(out).unflatten(0, (batches, heads)).transpose(1, 2)
    assert stacked.shape[-1] == width
    return stacked


def _one_head(setup: Setup, method: RectifiedSpaAttn, read: torch.Tensor, finer: torch.Tensor) -> torch.Tensor:
    row = torch.arange(len(setup.q)) // method.q_block
    column = torch.arange(len(setup.k)) // method.kv_block
    logits = setup.logits.masked_fill(~read[row][:, column], NONE)
    if method.compensation == "merge":
        k, _, count = pools(setup.k, method.tokens_per_pooled_key, setup.exists)
        v, _, _ = pools(setup.v, method.tokens_per_pooled_key, setup.exists)
        owner = torch.arange(len(k)) * method.tokens_per_pooled_key // method.kv_block
        virtual = setup.q @ k.T * setup.scale + count.log()
        if method.variance:
            square, _, _ = pools(setup.k**2, method.tokens_per_pooled_key, setup.exists)
            spread = (square - k**2).clamp(min=0.0)
            virtual = virtual + (0.5 * setup.scale**2 * (setup.q**2 @ spread.T)).clamp(max=2.0)
        virtual = virtual.masked_fill((read | finer)[row][:, owner], NONE)
        size = method.tokens_per_fine_key
        small_k, _, number = pools(setup.k, size, setup.exists)
        small_v, _, _ = pools(setup.v, size, setup.exists)
        owner = torch.arange(len(small_k)) * size // method.kv_block
        between = (setup.q @ small_k.T * setup.scale + number.log()).masked_fill(~finer[row][:, owner], NONE)
        weights = torch.softmax(torch.cat([logits, between, virtual], -1), -1)
        out = weights @ torch.cat([setup.v, small_v, v])
        if method.first_order:
            slope = setup.scale * setup.q @ _covariance(setup, method)
            out = out + weights[:, -len(k) :].sum(-1, keepdim=True) * slope
        return out
    sparse = torch.softmax(logits, -1).nan_to_num(0.0) @ setup.v
    if method.compensation == "none":
        return sparse
    mass = pooled_map(setup, method)
    q, dq, _ = pools(setup.q, method.q_block, torch.ones(len(setup.q), dtype=torch.bool))
    k, dk, count = pools(setup.k, method.kv_block, setup.exists)
    v, _, _ = pools(setup.v, method.kv_block, setup.exists)
    good = (q @ k.T).abs() > (dq @ k.T).abs() + (q @ dk.T).abs() if method.gate else torch.ones_like(read)
    added = ~read & good & (count > 0)
    if method.compensation == "paper":
        scale = torch.where(read, mass, 0.0).sum(-1)
    else:
        scale = 1.0 - torch.where(added, mass, 0.0).sum(-1)
    return scale[row, None] * sparse + (torch.where(added, mass, 0.0) @ v)[row]


def _covariance(setup: Setup, method: RectifiedSpaAttn) -> torch.Tensor:
    """(D, D) mean covariance of visual keys and values behind a pooled key."""
    total, size = torch.zeros(setup.k.shape[1], setup.v.shape[1], dtype=torch.float64), method.tokens_per_pooled_key
    for low in range(0, setup.visual, size):
        keys, values = (x[low : min(low + size, setup.visual)] for x in (setup.k, setup.v))
        total += (keys - keys.mean(0)).T @ (values - values.mean(0))
    return total / setup.visual
