"""The key blocks to gather from: copied into contiguous rows, or in place where a copy would be large."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from dit_attn.kernels.backends.gather.threads import LARGE, run_parts
from dit_attn.kernels.backends.gather.workspace import Workspace
from dit_attn.kernels.layouts.block_layout import BlockLayout


@dataclass(frozen=True)
class KeyBlocks:
    """Key (or value) blocks of some heads, copied, or of one head in place.

    Attributes:
        rows: copied, (heads * nk, kv_block * D) with zeros past the sequence; in place, (full blocks, kv_block, D) of
            any strides.
        dtype: of the matrix product.
        tail: in place, (tokens, D) of the ragged last block, or ``None``.
        exists: in place, (nk, kv_block) bool, keys that exist; ``None`` for all.
    """

    rows: torch.Tensor
    dtype: torch.dtype
    tail: torch.Tensor | None = None
    exists: torch.Tensor | None = None

    @property
    def width(self) -> int:
        """Elements of a block."""
        return self.rows[0].numel()

    def gather(self, index: torch.Tensor, out: torch.Tensor, workspace: Workspace) -> None:
        """Gather blocks ``index`` (n,) into ``out`` (n, kv_block * D) of ``dtype``; 0 where there is no key."""
        if self.rows.ndim == 2:
            torch.index_select(self.rows, 0, index, out=out)
            return
        full, block, dim = self.rows.shape
        out = out.view(-1, block, dim)
        inner = index if self.tail is None else index.clamp(max=full - 1)
        if self.rows.dtype == self.dtype:
            torch.index_select(self.rows, 0, inner, out=out)
        else:
            raw = workspace.get("raw", self.rows.dtype, out.device, *out.shape)
            out.copy_(torch.index_select(self.rows, 0, inner, out=raw))
        if self.tail is not None:
            for place in (index == full).nonzero()[:, 0].tolist():
                out[place, : len(self.tail)] = self.tail
                out[place, len(self.tail) :] = 0.0
        if self.exists is not None:
            out.masked_fill_(~self.exists.index_select(0, index)[..., None], 0.0)


def blocks_in_place(x: torch.Tensor, layout: BlockLayout, mask: torch.Tensor | None, dtype: torch.dtype) -> KeyBlocks:
    """Refer to one head (Sk, 1, D) in place; at least one block is full."""
    x, full = x[:, 0], len(x) // layout.kv_block
    cut, missing = full * layout.kv_block, layout.nk * layout.kv_block - len(x)
    exists = None if mask is None else F.pad(mask, (0, missing)).view(layout.nk, layout.kv_block)
    return KeyBlocks(x[:cut].unflatten(0, (full, layout.kv_block)), dtype, x[cut:] if missing else None, exists)


def copied_blocks(
    x: torch.Tensor, layout: BlockLayout, mask: torch.Tensor | None, dtype: torch.dtype, name: str, workspace: Workspace
) -> KeyBlocks:
    """Copy heads (Sk, heads, D) into contiguous blocks; ``name`` is that of the workspace buffer."""
    seq, heads, dim = x.shape
    buffer = workspace.get(name, dtype, x.device, heads, layout.nk * layout.kv_block, dim)

    def copy(low: int, high: int) -> None:
        buffer[:, low:high].copy_(x[low:high].transpose(0, 1))

    run_parts(copy, seq, x.device, large=x.numel() > LARGE)
    if seq < buffer.shape[1]:
        buffer[:, seq:] = 0.0
    if mask is not None:
        buffer[:, :seq].masked_fill_(~mask[:, None], 0.0)
    return KeyBlocks(buffer.view(heads * layout.nk, layout.kv_block * dim), dtype)
