"""The yardstick of the backward kernels: gradients of dense attention with the same tiles, over consecutive blocks."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dit_attn.kernels.backends.triton.attention import Config
from dit_attn.kernels.backends.triton.tiles import LOG2E
from dit_attn.kernels.triton_launch import Launch
from tests._support.dense_attention_kernel import HEADS, SEQ


@triton.jit(do_not_specialize=["length", "steps"])
def dense_dq_kernel(
    q, k, v, grad, dq, logs, delta, scale, length, steps, token,
    BM: tl.constexpr, BN: tl.constexpr, DIM: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compute dq through ``steps`` tiles of BN keys; ``token`` elements lie between two tokens, in units of 8."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    columns, stride, inside = tl.arange(0, DIM), token * 8, (rows < length)[:, None]
    own = rows.to(tl.int64)[:, None] * stride + columns[None, :]
    queries, g = tl.load(q + own, mask=inside, other=0.0), tl.load(grad + own, mask=inside, other=0.0)
    row_logs, row_delta = tl.load(logs + rows), tl.load(delta + rows)
    offsets = tl.arange(0, BN).to(tl.int64)[:, None] * stride + columns[None, :]
    acc = tl.zeros([BM, DIM], tl.float32)
    c = scale * LOG2E
    for step in tl.range(0, steps, num_stages=STAGES):
        base = (step * BN).to(tl.int64) * stride
        keys = tl.load(k + base + offsets)
        p = tl.exp2(tl.dot(queries, tl.trans(keys)) * c - row_logs[:, None])
        ds = p * (tl.dot(g, tl.trans(tl.load(v + base + offsets))) - row_delta[:, None])
        acc += tl.dot(ds.to(keys.dtype), keys)
    tl.store(dq + own, (acc * scale).to(dq.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["length", "steps"])
def dense_dkv_kernel(
    q, k, v, grad, dk, dv, logs, delta, scale, length, steps, token,
    BM: tl.constexpr, BN: tl.constexpr, DIM: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compute dk and dv through ``steps`` tiles of BM queries."""
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    columns, stride, inside = tl.arange(0, DIM), token * 8, (rows < length)[:, None]
    own = rows.to(tl.int64)[:, None] * stride + columns[None, :]
    keys, values = tl.load(k + own, mask=inside, other=0.0), tl.load(v + own, mask=inside, other=0.0)
    places = tl.arange(0, BM)
    offsets = places.to(tl.int64)[:, None] * stride + columns[None, :]
    key_sums, value_sums = tl.zeros([BN, DIM], tl.float32), tl.zeros([BN, DIM], tl.float32)
    c = scale * LOG2E
    for step in tl.range(0, steps, num_stages=STAGES):
        first = step * BM
        base = first.to(tl.int64) * stride
        queries, g = tl.load(q + base + offsets), tl.load(grad + base + offsets)
        p = tl.exp2(tl.dot(keys, tl.trans(queries)) * c - tl.load(logs + first + places)[None, :])
        ds = p * (tl.dot(values, tl.trans(g)) - tl.load(delta + first + places)[None, :])
        value_sums += tl.dot(p.to(g.dtype), g)
        key_sums += tl.dot(ds.to(queries.dtype), queries)
    tl.store(dk + own, (key_sums * scale).to(dk.dtype.element_ty), mask=inside)
    tl.store(dv + own, value_sums.to(dv.dtype.element_ty), mask=inside)


def plan_dense_gradients(dim: int, for_q: Config, for_k: Config) -> tuple[Launch, Launch]:
    """Prepare the launches for dq, and for dk and dv, in bf16."""
    x, rows = torch.zeros(1, SEQ, HEADS, dim, dtype=torch.bfloat16), torch.zeros(SEQ)
    shared = {
        "q": x, "k": x, "v": x, "grad": x, "dq": x, "dk": x, "dv": x, "logs": rows, "delta": rows,
        "scale": dim**-0.5, "length": SEQ, "token": HEADS * dim // 8, "DIM": dim,
    }  # fmt: skip
    plans = ((dense_dq_kernel, for_q, for_q.columns, for_q.rows), (dense_dkv_kernel, for_k, for_k.rows, for_k.columns))
    launches = []
    for kernel, config, inner, outer in plans:
        own = {"steps": SEQ // inner, "BM": config.rows, "BN": config.columns, "STAGES": config.stages}
        launches.append(Launch(kernel, SEQ // outer, {**shared, **own}, config.warps, config.stages))
    return launches[0], launches[1]
