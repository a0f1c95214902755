"""Launches of the Triton kernels of linear attention; the products between them are torch's."""

from __future__ import annotations

from typing import Any

import torch

from dit_attn.kernels.backends.triton.attention import INTERPRET, tile_of
from dit_attn.kernels.device import allows_tf32
from dit_attn.kernels.linear.call import LinearCall
from dit_attn.kernels.linear.feature_maps import FEATURE_MAPS
from dit_attn.kernels.linear.triton_kernels import (
    key_gradients_kernel,
    key_sums_kernel,
    row_gradients_kernel,
    rows_kernel,
)
from dit_attn.kernels.triton_launch import Launch

ROWS = 64  # tokens per step

Sums = tuple[torch.Tensor, torch.Tensor, dict[str, int]]
"""Sums (..., D, Dv) and (..., D) of blocks, and their strides by head and block."""


def triton_linear_forward(call: LinearCall) -> torch.Tensor:
    """Compute o (B, Sq, H, Dv) in q's dtype."""
    call = _unit_stride(call)
    out = call.q.new_empty(*call.q.shape[:3], call.v.shape[-1])
    launch_rows(call, _of_query_blocks(call), out).run()
    return out


def triton_linear_backward(
    call: LinearCall, out: torch.Tensor, grad: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute the gradients of q, k and v, in their dtypes; ``grad`` is that of ``out``."""
    call, grad = _unit_stride(call), grad.contiguous()
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (call.q, call.k, call.v))
    per_row = _empty_sums(call, call.q.shape[2], call.nq)
    launch_row_gradients(call, _of_query_blocks(call), out, grad, dq, per_row).run()
    launch_key_gradients(call, _of_key_blocks(call, *per_row), dk, dv).run()
    return dq, dk, dv


# -- sums over blocks --------------------------------------------------------------------------------------------------


def _empty_sums(call: LinearCall, heads: int, blocks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, heads, blocks, D, Dv) in q's dtype and (B, heads, blocks, D) fp32."""
    shape = (call.q.shape[0], heads, blocks, call.q.shape[-1])
    return call.q.new_empty(*shape, call.v.shape[-1]), call.q.new_empty(*shape, dtype=torch.float32)


def _of_query_blocks(call: LinearCall) -> Sums:
    """h and z of every query block of every query head; of every key head where all keys are attended to."""
    sums, totals = _empty_sums(call, call.k.shape[2], call.nk)
    launch_key_sums(call, sums, totals).run()
    if call.blocks is None:
        return _everywhere(sums.sum(2, dtype=torch.float32).to(sums.dtype), totals.sum(2))
    pairs = _pairs(call)
    return _per_block(*(_over_blocks(pairs, x).unflatten(2, (call.ratio, -1)).flatten(1, 2) for x in (sums, totals)))


def _of_key_blocks(call: LinearCall, sums: torch.Tensor, totals: torch.Tensor) -> Sums:
    """G and t of every key block of every key head."""
    sums, totals = (x.unflatten(1, (-1, call.ratio)).flatten(2, 3) for x in (sums, totals))
    if call.blocks is None:
        return _everywhere(sums.sum(2, dtype=torch.float32).to(sums.dtype), totals.sum(2))
    pairs = _pairs(call).mT
    return _per_block(_over_blocks(pairs, sums), _over_blocks(pairs, totals))


def _pairs(call: LinearCall) -> torch.Tensor:
    """(B|1, Hk, r * nq, nk) bool."""
    assert call.blocks is not None
    blocks = call.blocks.expand(-1, call.q.shape[2], -1, -1)
    return blocks.unflatten(1, (-1, call.ratio)).flatten(2, 3)


def _over_blocks(pairs: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """(B, Hk, m, ...), sums of x (B, Hk, n, ...) over the pairs (B|1, Hk, m, n)."""
    return (pairs.to(x.dtype) @ x.flatten(3)).unflatten(-1, x.shape[3:]).contiguous()


def _per_block(sums: torch.Tensor, totals: torch.Tensor) -> Sums:
    block, width = sums[0, 0, 0].numel(), totals.shape[-1]
    return sums, totals, {"h_h": sums.shape[2] * block, "h_i": block, "z_h": sums.shape[2] * width, "z_i": width}


def _everywhere(sums: torch.Tensor, totals: torch.Tensor) -> Sums:
    """(B, Hk, D, Dv) sums that are those of every block."""
    return sums, totals, {"h_h": sums[0, 0].numel(), "h_i": 0, "z_h": totals.shape[-1], "z_i": 0}


# -- launches ----------------------------------------------------------------------------------------------------------


def launch_key_sums(call: LinearCall, sums: torch.Tensor, totals: torch.Tensor) -> Launch:
    """Prepare the launch that fills H and Z."""
    batch, _, heads, _ = call.k.shape
    arguments = {
        "k": call.k, "v": call.v, "sums": sums, "totals": totals, **_strides(k=call.k, v=call.v), **_keys(call),
        "heads": heads, "blocks": call.nk, **_options(call),
    }  # fmt: skip
    return Launch(key_sums_kernel, batch * heads * call.nk, arguments, warps=8, stages=2)


def launch_rows(call: LinearCall, given: Sums, out: torch.Tensor) -> Launch:
    """Prepare the launch that fills the output."""
    arguments = {"q": call.q, "out": out, **_strides(q=call.q, o=out), **_rows(call, given), **_options(call)}
    return Launch(rows_kernel, call.q.shape[0] * call.q.shape[2] * call.nq, arguments, warps=8, stages=2)


def launch_row_gradients(
    call: LinearCall, given: Sums, out: torch.Tensor, grad: torch.Tensor, dq: torch.Tensor, found: Any
) -> Launch:
    """Prepare the launch that fills dq, and ``found`` with R and r."""
    arguments = {
        "q": call.q, "out": out, "grad": grad, "dq": dq, "sums": found[0], "totals": found[1],
        **_strides(q=call.q, o=out, g=grad, dq=dq), **_rows(call, given), **_options(call),
    }  # fmt: skip
    return Launch(row_gradients_kernel, call.q.shape[0] * call.q.shape[2] * call.nq, arguments, warps=8, stages=1)


def launch_key_gradients(call: LinearCall, given: Sums, dk: torch.Tensor, dv: torch.Tensor) -> Launch:
    """Prepare the launch that fills dk and dv."""
    sums, totals, steps = given
    arguments = {
        "k": call.k, "v": call.v, "h": sums, "z": totals, "dk": dk, "dv": dv, **steps,
        **_strides(k=call.k, v=call.v, dk=dk, dv=dv), **_keys(call),
        "heads": call.k.shape[2], "blocks": call.nk, **_options(call),
    }  # fmt: skip
    return Launch(key_gradients_kernel, call.k.shape[0] * call.k.shape[2] * call.nk, arguments, warps=8, stages=1)


def _rows(call: LinearCall, given: Sums) -> dict[str, Any]:
    """Arguments of the kernels that go by query blocks."""
    sums, totals, steps = given
    size = tile_of(call.q_block, ROWS)
    return {
        "h": sums, "z": totals, **steps, "heads": call.q.shape[2], "ratio": call.q.shape[2] // sums.shape[1],
        "blocks": call.nq, "q_len": call.q.shape[1], "BM": size, "PARTS": call.q_block // size,
    }  # fmt: skip


def _keys(call: LinearCall) -> dict[str, Any]:
    """Arguments of the kernels that go by key blocks."""
    weight, size = call.key_weight, tile_of(call.kv_block, ROWS)
    return {
        "weight": call.k if weight is None else weight, "WEIGHT": weight is not None,
        "w_b": 0 if weight is None or weight.shape[0] == 1 else weight.stride(0),
        "w_h": 0 if weight is None or weight.shape[1] == 1 else weight.stride(1),
        "kv_len": call.k.shape[1], "BN": size, "PARTS": call.kv_block // size,
    }  # fmt: skip


def _options(call: LinearCall) -> dict[str, Any]:
    dim, value_dim = call.q.shape[-1], call.v.shape[-1]
    return {
        "DIM": dim, "DK": 1 << (dim - 1).bit_length(), "VDIM": value_dim, "DV": 1 << (value_dim - 1).bit_length(),
        "MAP": FEATURE_MAPS.index(call.feature_map), "UPCAST": INTERPRET and call.q.dtype == torch.bfloat16,
        "PRECISION": "tf32" if call.q.dtype != torch.float32 or allows_tf32() else "ieee",
    }  # fmt: skip


def _strides(**tensors: torch.Tensor) -> dict[str, int]:
    """Strides by batch, token and head of (B, S, H, D) tensors, by the names of the kernels' arguments."""
    return {f"{name}_{axis}": x.stride(dim) for name, x in tensors.items() for dim, axis in enumerate("bsh")}


def _unit_stride(call: LinearCall) -> LinearCall:
    """The call with channels next to each other, and weights in fp32."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (call.q, call.k, call.v))
    weight = None if call.key_weight is None else call.key_weight.float().contiguous()
    return LinearCall(q, k, v, call.blocks, weight, call.feature_map, call.q_block, call.kv_block)
