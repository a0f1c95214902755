"""The choice between the two implementations of pooling and selection: plain torch, or fused Triton kernels."""

from __future__ import annotations

import torch

from dit_attn.errors import DitAttnError, unknown
from dit_attn.kernels.checks import dtype_name
from dit_attn.kernels.device import unsupported_reason_triton

MAX_KEY_BLOCKS = 8192
"""Key blocks per row the fused kernels can choose from."""


def unsupported_reason_fused(x: torch.Tensor, kv_blocks: int = 1, head_dim: int = 1) -> str | None:
    """Return why the fused kernels cannot run a selection, or ``None`` if they can.

    Args:
        x: the queries, or the scores, of the call.
        kv_blocks: key blocks per row.
        head_dim: head size of the queries.
    """
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"the kernels compute in fp32, which cannot represent {dtype_name(x.dtype)}"
    if head_dim > 256:
        return f"head size {head_dim} is above 256"
    if kv_blocks > MAX_KEY_BLOCKS:
        return f"{kv_blocks} key blocks are more than {MAX_KEY_BLOCKS}"
    return unsupported_reason_triton(x.device)


def uses_triton(backend: str | None, x: torch.Tensor, kv_blocks: int = 1, head_dim: int = 1) -> bool:
    """Return whether the fused kernels run a selection: if requested, or by default on a GPU that supports them.

    Args:
        backend: ``"triton"``, ``"torch"`` or ``None`` to choose.
        x, kv_blocks, head_dim: as for :func:`unsupported_reason_fused`.

    Raises:
        DitAttnError: an unknown backend, or ``"triton"`` where it cannot run.
    """
    if backend not in (None, "triton", "torch"):
        raise unknown("selection backend", backend, ("triton", "torch"))
    if backend == "torch" or (backend is None and x.device.type == "cpu"):
        return False
    reason = unsupported_reason_fused(x, kv_blocks, head_dim)
    if reason and backend:
        raise DitAttnError(f"selection backend 'triton' cannot run this call: {reason}; use 'torch' or leave it out")
    return reason is None
