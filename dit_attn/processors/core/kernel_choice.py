"""The kernel of sparse calls where this machine decides on it, in one line: counted in a run, and said before one."""

from __future__ import annotations

import torch

from dit_attn.kernels import BlockLayout, Terms, choose_backend
from dit_attn.processors.core.call import AttentionCall, Request

_BLOCK = 128  # tokens


def count_kernel(call: AttentionCall, request: Request) -> None:
    """Count a call by its kernel and the reason, where that is a property of the machine: of 16-bit types on a CPU.

    Args:
        call: the attention call, whose layer's statistics count.
        request: what was computed; calls of two levels and of a method's own are left out.
    """
    q = call.q
    if torch.compiler.is_compiling() or q.device.type != "cpu" or q.element_size() != 2:
        return
    if request.layout is None or request.compute_visual is not None or request.fine is not None:
        return
    terms = Terms(None, request.bias(call.visual), request.compensation, request.epilogue)
    mask = request.key_mask if request.key_bias is None else None
    choice = choose_backend(
        q[:, call.visual], request.layout, v=call.v, key_mask=mask, key_bias=request.key_bias, terms=terms
    )
    if choice.why:
        call.layer.stats.kernels[f"{choice.backend}: {choice.why}"] += 1


def expected_kernel(device: torch.device, dtype: torch.dtype, head_dim: int, tokens: int, density: float) -> str:
    """Return the same line of plain calls of a shape, empty where nothing of the machine decides.

    Args:
        device: where they run.
        dtype: of q, k and v.
        head_dim: D.
        tokens: S.
        density: of the key blocks.
    """
    if device.type != "cpu":
        return ""
    blocks = -(-tokens // _BLOCK)
    width = max(1, round(density * blocks))
    lists, counts = torch.zeros(1, 1, blocks, width, dtype=torch.int32), torch.full((1, 1, blocks), width)
    layout = BlockLayout(_BLOCK, _BLOCK, tokens, tokens, lists, counts.int())
    choice = choose_backend(torch.empty(1, tokens, 1, head_dim, dtype=dtype), layout)
    return f"{choice.backend}: {choice.why}" if choice.why else ""
