"""Block-sparse attention with nothing but torch: gather the selected key blocks of a tile, then two matrix products.

For every tile (one query block of one head) the selected blocks of K and V are copied side by side and the tile is an
ordinary dense attention over them. Tiles with the same number of key blocks are batched until a chunk fills the cache.
Memory beyond q, k, v and o is one head group and one chunk: linear in the sequence. Differentiable through autograd.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from dit_attn.kernels.layout import BlockLayout

_CHUNK_BYTES = {"cpu": 1 << 20}  # per thread: gathered K, V and the tile's map stay in the cache
_GROUP_BYTES = {"cpu": 8 << 20}  # K and V of the heads that are laid out in blocks at a time
_LARGE = 256 << 20
_DISTINCT_COUNTS = 16  # more row lengths than this are rounded up and masked, so that chunks stay full


@dataclass
class _Group:
    """The heads ``h0:h1`` (and key heads ``g0:g1``) of one batch row, laid out in blocks."""

    batch: int
    h0: int
    h1: int
    q: torch.Tensor  # (tiles, q_block, D)
    k: torch.Tensor  # (key heads * nk, kv_block * D)
    v: torch.Tensor  # (key heads * nk, kv_block * Dv)
    bias: torch.Tensor | None  # (key heads or heads * nk, kv_block) fp32, -inf where no key is
    idx: torch.Tensor  # (tiles, kcap) int64 rows of k and v
    bias_idx: torch.Tensor | None  # (tiles, kcap) int64 rows of bias
    count: torch.Tensor  # (tiles,) int32


def gather_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: BlockLayout,
    *,
    scale: float | None = None,
    key_mask: torch.Tensor | None = None,
    key_bias: torch.Tensor | None = None,
    return_lse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Arguments and results as :func:`dit_attn.kernels.reference_attention`; lse is ``None`` unless asked for."""
    batch, q_len, heads, _ = q.shape
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    outs: list[torch.Tensor] = []
    out = q.new_empty(batch, q_len, heads, v.shape[-1])
    lse = torch.empty(batch, heads, q_len, dtype=dtype, device=q.device) if return_lse else None
    for group in _groups(q, k, v, layout, key_mask, key_bias):
        tile_out, tile_lse = _attend(group, layout, scale, v.shape[-1], return_lse, grad)
        rows = tile_out.view(group.h1 - group.h0, -1, v.shape[-1])[:, :q_len]
        if grad:
            outs.append(rows)
        else:
            out[group.batch, :, group.h0 : group.h1] = rows.transpose(0, 1)
        if lse is not None and tile_lse is not None:
            lse[group.batch, group.h0 : group.h1] = tile_lse.view(group.h1 - group.h0, -1)[:, :q_len]
    if grad:
        out = torch.cat(outs).view(batch, heads, q_len, v.shape[-1]).transpose(1, 2)
    return out, lse


def _groups(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: BlockLayout,
    key_mask: torch.Tensor | None,
    key_bias: torch.Tensor | None,
) -> Iterator[_Group]:
    batch, _, heads, _ = q.shape
    key_heads, ratio = k.shape[2], heads // k.shape[2]
    per_head = layout.nk * layout.kv_block * (k.shape[-1] + v.shape[-1]) * k.element_size()
    size = max(1, min(key_heads, _GROUP_BYTES.get(q.device.type, _LARGE) // per_head))
    idx = layout.kv_idx.to(q.device)
    count = layout.kv_cnt.to(q.device)
    for b in range(batch):
        for g0 in range(0, key_heads, size):
            g1 = min(g0 + size, key_heads)
            h0, h1 = g0 * ratio, g1 * ratio
            tiles_idx = _rows(idx, b, h0, h1).long()
            shift = torch.arange(h1 - h0, device=q.device).view(-1, 1, 1) * layout.nk
            bias = _bias(layout, key_mask, key_bias, b, h0, h1, q.device)
            shared = bias is not None and bias.shape[0] == 1
            yield _Group(
                batch=b,
                h0=h0,
                h1=h1,
                q=_blocks(q[b, :, h0:h1], layout.nq, layout.q_block).view(-1, layout.q_block, q.shape[-1]),
                k=_blocks(k[b, :, g0:g1], layout.nk, layout.kv_block),
                v=_blocks(v[b, :, g0:g1], layout.nk, layout.kv_block),
                bias=None if bias is None else bias.reshape(-1, layout.kv_block),
                idx=(tiles_idx + (shift // layout.nk // ratio) * layout.nk).flatten(0, 1),
                bias_idx=None if bias is None else (tiles_idx if shared else tiles_idx + shift).flatten(0, 1),
                count=_rows(count[..., None], b, h0, h1).flatten(),
            )


def _rows(x: torch.Tensor, b: int, h0: int, h1: int) -> torch.Tensor:
    """Rows of one batch entry and a range of heads of a (B|1, H|1, ...) tensor, heads expanded."""
    x = x[b if x.shape[0] > 1 else 0]
    return x[h0:h1] if x.shape[0] > 1 else x.expand(h1 - h0, *x.shape[1:])


def _blocks(x: torch.Tensor, n: int, block: int) -> torch.Tensor:
    """(S, heads, D) to (heads * n, block * D), contiguous, zero-padded."""
    seq, heads, dim = x.shape
    x = x.transpose(0, 1)
    if n * block != seq:
        x = F.pad(x, (0, 0, 0, n * block - seq))
    return x.reshape(heads * n, block * dim)


def _bias(
    layout: BlockLayout,
    key_mask: torch.Tensor | None,
    key_bias: torch.Tensor | None,
    b: int,
    h0: int,
    h1: int,
    device: torch.device,
) -> torch.Tensor | None:
    """(1 or heads, nk * kv_block) fp32 added to the logits, ``-inf`` on keys that do not exist; ``None`` for nothing."""
    total = layout.nk * layout.kv_block
    if key_mask is None and key_bias is None and total == layout.kv_len:
        return None
    bias = torch.zeros(1, layout.kv_len, device=device)
    if key_bias is not None:
        bias = _rows(key_bias.to(device, torch.float32), b, h0, h1)
        if key_bias.shape[1] == 1:
            bias = bias[:1]
    if key_mask is not None:
        bias = bias.masked_fill(~key_mask[b].to(device), float("-inf"))
    return F.pad(bias, (0, total - layout.kv_len), value=float("-inf"))


def _attend(
    group: _Group, layout: BlockLayout, scale: float, dim_v: int, return_lse: bool, grad: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Every tile of a group: (tiles, q_block, Dv) and (tiles, q_block) natural-log sums."""
    tiles, q_block, dim = group.q.shape
    out = group.q.new_zeros(tiles, q_block, dim_v)
    lse = torch.full((tiles, q_block), float("-inf"), device=out.device) if return_lse else None
    if lse is not None and group.q.dtype == torch.float64:
        lse = lse.double()
    buffers = _Buffers(grad)
    bytes_per_key = (dim + dim_v + 2 * q_block) * group.q.element_size()
    budget = _CHUNK_BYTES.get(out.device.type, _LARGE) * max(1, torch.get_num_threads())
    parts: list[tuple[torch.Tensor, torch.Tensor]] = []
    for members, width, padded in _buckets(group.count, group.idx.shape[1]):
        step = max(1, budget // (width * layout.kv_block * bytes_per_key))
        for chunk in members.split(step):
            o, chunk_lse = _tile(group, layout, chunk, width, padded, scale, buffers, return_lse)
            if grad:
                parts.append((chunk, o))
            else:
                out[chunk] = o
            if lse is not None and chunk_lse is not None:
                lse[chunk] = chunk_lse.detach()
    if parts:
        out = out.index_copy(0, torch.cat([chunk for chunk, _ in parts]), torch.cat([o for _, o in parts]))
    return out, lse


def _buckets(count: torch.Tensor, kcap: int) -> Iterator[tuple[torch.Tensor, int, bool]]:
    """Groups of tiles that are computed together: (tile numbers, key blocks per tile, whether some are padding).

    On an accelerator the counts are not read back: one bucket as wide as the lists.
    """
    everything = torch.arange(count.numel(), device=count.device)
    if count.device.type != "cpu":
        yield everything, kcap, True
        return
    low, high = int(count.min()), int(count.max())
    if low == high:
        if high:
            yield everything, high, False
        return
    distinct = torch.unique(count)
    widths = count.long()
    rounded = len(distinct) > _DISTINCT_COUNTS
    if rounded:
        grain = max(1, high // _DISTINCT_COUNTS)
        widths = ((widths + grain - 1) // grain * grain).clamp(max=kcap)
    for width in torch.unique(widths).tolist():
        if width:
            yield everything[(widths == width) & (count > 0)], int(width), rounded


class _Buffers:
    """Scratch tensors that are reused between chunks of one shape; none when autograd must keep them."""

    def __init__(self, grad: bool) -> None:
        self.grad = grad
        self.kept: dict[tuple[str, tuple[int, ...]], torch.Tensor] = {}

    def get(self, name: str, like: torch.Tensor, *shape: int) -> torch.Tensor | None:
        if self.grad:
            return None
        key = (name, shape)
        if key not in self.kept:
            self.kept[key] = like.new_empty(shape)
        return self.kept[key]


def _tile(
    group: _Group,
    layout: BlockLayout,
    chunk: torch.Tensor,
    width: int,
    padded: bool,
    scale: float,
    buffers: _Buffers,
    return_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Dense attention of a chunk of tiles over their gathered keys."""
    n, keys = chunk.numel(), width * layout.kv_block
    q = group.q[chunk]
    rows = group.idx[chunk, :width].reshape(-1)
    k = _select(group.k, rows, buffers.get("k", group.k, n * width, group.k.shape[1])).view(n, keys, -1)
    v = _select(group.v, rows, buffers.get("v", group.v, n * width, group.v.shape[1])).view(n, keys, -1)
    buffer = buffers.get("s", q, n, layout.q_block, keys)
    seed = q.new_zeros(1) if buffer is None else buffer
    logits = torch.baddbmm(
        seed, q, k.transpose(1, 2), beta=0, alpha=scale, **({} if buffer is None else {"out": buffer})
    )
    empty = None
    if padded or group.bias is not None:
        bias = _chunk_bias(group, chunk, width, padded, layout.kv_block)
        logits = logits + bias if buffers.grad else logits.add_(bias)
        empty = bias.amax(-1, keepdim=True) == float("-inf")
    if not return_lse:
        weights = torch.softmax(logits, -1, **({} if buffer is None else {"out": buffer}))
        lse = None
    else:
        wide = logits if logits.dtype == torch.float64 else logits.float()
        lse = torch.logsumexp(wide, -1)
        finite = lse.masked_fill(lse == float("-inf"), 0.0)
        weights = torch.exp(wide - finite[..., None]).to(q.dtype)
    if empty is not None:
        weights = weights.masked_fill(empty, 0.0)
    return torch.bmm(weights, v), lse


def _select(source: torch.Tensor, rows: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    return source.index_select(0, rows) if out is None else torch.index_select(source, 0, rows, out=out)


def _chunk_bias(group: _Group, chunk: torch.Tensor, width: int, padded: bool, kv_block: int) -> torch.Tensor:
    """(tiles, 1, keys) in q's dtype: the key bias of the gathered blocks, ``-inf`` on padding blocks."""
    if group.bias is None or group.bias_idx is None:
        bias = torch.zeros(chunk.numel(), width, kv_block, device=group.q.device)
    else:
        bias = group.bias[group.bias_idx[chunk, :width]]
    if padded:
        beyond = torch.arange(width, device=bias.device) >= group.count[chunk, None]
        bias = bias.masked_fill(beyond[..., None], float("-inf"))
    return bias.flatten(1)[:, None].to(group.q.dtype)
