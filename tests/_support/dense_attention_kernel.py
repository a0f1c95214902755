"""The yardstick of the sparse forward kernel: dense attention in Triton with the same tiles, over consecutive keys."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dit_attn.kernels.backends.triton.attention import Config
from dit_attn.kernels.backends.triton.forward import LARGEST_SUM
from dit_attn.kernels.backends.triton.loops import plain_step
from dit_attn.kernels.backends.triton.tiles import LOG2E
from dit_attn.kernels.triton_launch import Launch

SEQ, HEADS = 4096, 8


@triton.jit(do_not_specialize=["length", "steps"])
def dense_kernel(
    q, k, v, o, scale, length, steps, token,
    BM: tl.constexpr, BN: tl.constexpr, DIM: tl.constexpr, LAZY: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Attend to ``steps`` tiles of BN keys; ``token`` elements lie between two tokens, in units of 8."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    columns = tl.arange(0, DIM)
    stride = token * 8
    queries = tl.load(
        q + rows.to(tl.int64)[:, None] * stride + columns[None, :], mask=rows[:, None] < length, other=0.0
    )
    offsets = tl.arange(0, BN).to(tl.int64)[:, None] * stride + columns[None, :]
    m = tl.full([BM], float("-inf"), tl.float32)
    l = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, DIM], tl.float32)
    c = scale * LOG2E
    for step in tl.range(0, steps, num_stages=STAGES):
        base = (step * BN).to(tl.int64) * stride
        s = tl.dot(queries, tl.trans(tl.load(k + base + offsets)))
        if LAZY:
            if step == 0:
                m = tl.max(s, 1) * c
            p = tl.exp2(s * c - m[:, None])
            l += tl.sum(p, 1)
        else:
            p, shrink, m, l = plain_step(s, c, m, l)
            acc = acc * shrink[:, None]
        acc += tl.dot(p.to(v.dtype.element_ty), tl.load(v + base + offsets))
    if LAZY:
        acc = tl.where(tl.sum(l, 0) < LARGEST_SUM, acc, float("nan"))
    tl.store(
        o + rows.to(tl.int64)[:, None] * stride + columns[None, :],
        (acc / l[:, None]).to(o.dtype.element_ty), mask=rows[:, None] < length,
    )  # fmt: skip


def plan_dense(dim: int, config: Config, lazy: bool) -> Launch:
    """Prepare a launch in bf16."""
    x = torch.zeros(1, SEQ, HEADS, dim, dtype=torch.bfloat16)
    arguments = {
        "q": x, "k": x, "v": x, "o": x, "scale": dim**-0.5, "length": SEQ, "steps": SEQ // config.columns,
        "token": HEADS * dim // 8, "BM": config.rows, "BN": config.columns, "DIM": dim, "LAZY": lazy,
        "STAGES": config.stages,
    }  # fmt: skip
    return Launch(dense_kernel, SEQ // config.rows, arguments, config.warps, config.stages)
