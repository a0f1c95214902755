"""Block-sparse kernels of other libraries on the same layouts, where they are installed: for comparison only.

An adapter converts a layout into the format of the library, which is not timed, and returns a call that is timed as a
unit: copies into the library's tensor layout count, because a diffusers call would have to make them.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch

from dit_attn.errors import DitAttnError
from dit_attn.kernels.layouts.block_layout import BlockLayout

Call = Callable[[], torch.Tensor]
WORKSPACE = 256 << 20  # bytes; twice what FlashInfer recommends


@dataclass(frozen=True)
class ThirdPartyKernel:
    """The kernel of another library.

    Attributes:
        module: name of the module to import.
        prepare: ``(q, k, v, layout) -> call``; q, k, v (B, S, H, D), the call returns (B, S, H, D).
        note: what to know about its times.
    """

    module: str
    prepare: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, BlockLayout], Call]
    note: str


def prepare(name: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: BlockLayout) -> Call:
    """Prepare the call of another library's kernel on a layout.

    Raises:
        DitAttnError: it is not installed, or does not support the layout or the sizes.
    """
    library = THIRD_PARTY[name]
    if importlib.util.find_spec(library.module) is None:
        raise DitAttnError(f"{name} is not installed (no module {library.module}); see its installation guide")
    if q.device.type != "cuda":
        raise DitAttnError(f"{name} runs on NVIDIA GPUs only; leave it out")
    if layout.elements is not None:
        raise DitAttnError(f"{name} supports no element masks; leave it out")
    return library.prepare(q, k, v, layout)


def expanded(layout: BlockLayout, batch: int, heads: int, q_block: int, kv_block: int) -> torch.Tensor:
    """Return the block mask (B, H, nq, nk) bool of a layout in smaller blocks.

    Raises:
        DitAttnError: the sizes do not divide the layout's.
    """
    if layout.q_block % q_block or layout.kv_block % kv_block:
        raise DitAttnError(
            f"its blocks are {q_block} x {kv_block}, which do not divide {layout.q_block} x {layout.kv_block}"
        )
    mask = layout.block_mask().repeat_interleave(layout.q_block // q_block, 2)
    mask = mask.repeat_interleave(layout.kv_block // kv_block, 3)
    rows, columns = -(-layout.q_len // q_block), -(-layout.kv_len // kv_block)
    return mask[:, :, :rows, :columns].expand(batch, heads, -1, -1).contiguous()


def block_sizes(tokens: int, block: int, repeats: int, device: torch.device) -> torch.Tensor:
    """Return (repeats, n) int32, the tokens of every block."""
    sizes = torch.full((-(-tokens // block),), block, dtype=torch.int32, device=device)
    sizes[-1] = tokens - block * (len(sizes) - 1)
    return sizes.expand(repeats, -1).contiguous()


def _flashinfer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: BlockLayout) -> Call:
    """FlashInfer's ``VariableBlockSparseAttentionWrapper``: (heads, S, D) without a batch, a block mask a head."""
    flashinfer = importlib.import_module("flashinfer")
    batch, seq, heads, dim = q.shape
    if k.shape[2] != heads:
        raise DitAttnError("grouped heads share one mask there; this comparison has one per query head")
    rows = batch * heads  # heads are independent, so a batch is more of them
    wrapper = flashinfer.VariableBlockSparseAttentionWrapper(torch.empty(WORKSPACE, dtype=torch.uint8, device=q.device))
    mask = expanded(layout, batch, heads, layout.q_block, layout.kv_block).flatten(0, 1)
    wrapper.plan(
        block_mask_map=mask,
        block_row_sz=block_sizes(layout.q_len, layout.q_block, rows, q.device),
        block_col_sz=block_sizes(layout.kv_len, layout.kv_block, rows, q.device),
        num_qo_heads=rows,
        num_kv_heads=rows,
        head_dim=dim,
        q_data_type=q.dtype,
    )

    def call() -> torch.Tensor:
        heads_first = (x.transpose(1, 2).flatten(0, 1).contiguous() for x in (q, k, v))
        return wrapper.run(*heads_first).view(batch, heads, seq, dim).transpose(1, 2)

    return call


def _sparge(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: BlockLayout) -> Call:
    """SpargeAttn's ``block_sparse_sage2_attn_cuda``: int8 q k, fp8 p v; blocks of 128 x 64, on Hopper of 64 x 128."""
    sparge = importlib.import_module("spas_sage_attn")
    if q.shape[-1] not in (64, 128):
        raise DitAttnError(f"its head sizes are 64 and 128, not {q.shape[-1]}")
    hopper = torch.cuda.get_device_capability(q.device)[0] == 9
    mask = expanded(layout, q.shape[0], q.shape[2], *((64, 128) if hopper else (128, 64)))

    def call() -> torch.Tensor:
        out = sparge.block_sparse_sage2_attn_cuda(
            *(x.transpose(1, 2) for x in (q, k, v)), mask_id=mask, tensor_layout="HND"
        )
        return out.transpose(1, 2)

    return call


THIRD_PARTY = {
    "flashinfer": ThirdPartyKernel("flashinfer", _flashinfer, "its plan, made on the host, is not counted"),
    "spargeattn": ThirdPartyKernel("spas_sage_attn", _sparge, "quantised: int8 q k and fp8 p v, quantisation counted"),
}
