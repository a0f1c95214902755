"""Key blocks to gather from: copied side by side, or read where they stand when a copy would be large."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from dit_attn.kernels.layout import BlockLayout
from dit_attn.kernels.scratch import Scratch


@dataclass(frozen=True)
class Table:
    """Key blocks of some heads, laid out, or of one head in place.

    Attributes:
        rows: (heads * nk, kv_block * D), zeros where no key is; in place (whole blocks, kv_block, D), any strides.
        dtype: type that is multiplied.
        tail: in place, (tokens, D) of the ragged last block, or ``None``.
        exists: in place, (nk, kv_block) bool, keys that exist, or ``None`` for all.
    """

    rows: torch.Tensor
    dtype: torch.dtype
    tail: torch.Tensor | None = None
    exists: torch.Tensor | None = None

    @property
    def width(self) -> int:
        """Numbers in a block."""
        return self.rows[0].numel()

    def gather(self, index: torch.Tensor, out: torch.Tensor, scratch: Scratch) -> None:
        """Blocks ``index`` (n,) into ``out`` (n, kv_block * D) of ``dtype``; 0 where no key is."""
        if self.rows.ndim == 2:
            torch.index_select(self.rows, 0, index, out=out)
            return
        whole, block, dim = self.rows.shape
        out = out.view(-1, block, dim)
        inner = index if self.tail is None else index.clamp(max=whole - 1)
        if self.rows.dtype == self.dtype:
            torch.index_select(self.rows, 0, inner, out=out)
        else:
            raw = scratch.get("raw", self.rows.dtype, out.device, *out.shape)
            out.copy_(torch.index_select(self.rows, 0, inner, out=raw))
        if self.tail is not None:
            for place in (index == whole).nonzero()[:, 0].tolist():
                out[place, : len(self.tail)] = self.tail
                out[place, len(self.tail) :] = 0.0
        if self.exists is not None:
            out.masked_fill_(~self.exists.index_select(0, index)[..., None], 0.0)


def in_place(x: torch.Tensor, layout: BlockLayout, mask: torch.Tensor | None, dtype: torch.dtype) -> Table:
    """One head (Sk, 1, D) where it stands; at least one block is whole."""
    x, whole = x[:, 0], len(x) // layout.kv_block
    cut, missing = whole * layout.kv_block, layout.nk * layout.kv_block - len(x)
    exists = None if mask is None else F.pad(mask, (0, missing)).view(layout.nk, layout.kv_block)
    return Table(x[:cut].unflatten(0, (whole, layout.kv_block)), dtype, x[cut:] if missing else None, exists)


def laid_out(
    x: torch.Tensor, layout: BlockLayout, mask: torch.Tensor | None, dtype: torch.dtype, name: str, scratch: Scratch
) -> Table:
    """Heads (Sk, heads, D), contiguous; ``name`` is that of the buffer."""
    seq, heads, dim = x.shape
    buffer = scratch.get(name, dtype, x.device, heads, layout.nk * layout.kv_block, dim)
    buffer[:, :seq].copy_(x.transpose(0, 1))
    if seq < buffer.shape[1]:
        buffer[:, seq:] = 0.0
    if mask is not None:
        buffer[:, :seq].masked_fill_(~mask[:, None], 0.0)
    return Table(buffer.view(heads * layout.nk, layout.kv_block * dim), dtype)
