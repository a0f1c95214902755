"""Launches of the Triton attention kernels: configurations, grids and arguments, forward and backward."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from typing import Any

import torch

from dit_attn.kernels.backends.triton.backward import dkv_kernel, dq_kernel, row_kernel
from dit_attn.kernels.backends.triton.block_stats import block_stats_kernel
from dit_attn.kernels.backends.triton.forward import forward_kernel
from dit_attn.kernels.device import lse_dtype
from dit_attn.kernels.layouts.block_layout import BlockLayout, ceil_div, selected_bits
from dit_attn.kernels.layouts.element_masks import NUMBERS, BitMask
from dit_attn.kernels.problem import Problem
from dit_attn.kernels.terms import NO_TERMS, Compensation, Terms
from dit_attn.kernels.triton_launch import Launch

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True)
class Config:
    """Compile-time sizes of a kernel.

    Attributes:
        rows, columns: queries and keys per step.
        warps: per program.
        stages: of the software pipeline.
    """

    rows: int
    columns: int
    warps: int
    stages: int


EDGE_COLUMNS = 16  # keys (for dk and dv, queries) per step where masks are evaluated, which takes registers
POOLED_COLUMNS = 64  # pooled keys per step


def tile_of(block: int, largest: int = 128) -> int:
    """Return the largest power of two that divides ``block``, at most ``largest``."""
    return min(block & -block, largest)


def panels(dim: int) -> tuple[int, int]:
    """Split head channels into two powers of two: (64, 16) for 72, (64, 32) for 96, (128, 0) for 128."""
    first = 1 << (dim.bit_length() - 1)
    rest = dim - first
    return (first, 0) if rest == 0 else (first, max(16, 1 << (rest - 1).bit_length()))


def triton_forward(problem: Problem, terms: Terms = NO_TERMS, tma: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the forward pass: o (B, Sq, H, D) in q's dtype, lse (B, H, Sq) fp32, natural logarithm."""
    problem = _unit_stride(problem)
    q = problem.q
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[0], q.shape[2], q.shape[1], dtype=lse_dtype(q.dtype), device=q.device)
    if tma:
        let_kernels_allocate()
    plan_forward(problem, terms, out, lse, tma).run()
    return out, lse


def triton_block_stats(
    problem: Problem, statistic: str, pooled: Compensation | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute o and lse of a call over all blocks, and the mass or error of every block (B, H, nq, nk) fp32."""
    problem = _unit_stride(problem)
    out, lse = triton_forward(problem)
    layout, (batch, _, heads, _) = problem.layout, problem.q.shape
    tiles = layout.nq * (layout.q_block // stats_config(problem).rows)
    stats = torch.empty(batch, heads, tiles, layout.nk, dtype=torch.float32, device=out.device)
    plan_block_stats(problem, statistic, pooled, out, lse, stats).run()
    return out, lse, stats.unflatten(2, (layout.nq, -1)).sum(3)


def triton_backward(
    problem: Problem,
    out: torch.Tensor,
    lse: torch.Tensor,
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor,
    bias_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Compute the gradients of q, k, v (in their dtypes) and, with ``bias_grad``, of ``key_bias``; deterministic."""
    problem = _unit_stride(problem)
    grad_out = grad_out.contiguous()  # may be expanded
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (problem.q, problem.k, problem.v))
    dbias = None
    if bias_grad and problem.key_bias is not None:
        dbias = lse.new_empty(lse.shape[0], lse.shape[1], problem.k.shape[1])
    for launch in plan_backward(problem, out, lse, grad_out, grad_lse, dq, dk, dv, dbias):
        launch.run()
    if dbias is None or problem.key_bias is None:
        return dq, dk, dv, None
    shape = problem.key_bias.shape
    for dim in (0, 1):
        dbias = dbias.sum(dim, keepdim=True) if shape[dim] == 1 else dbias
    return dq, dk, dv, dbias.to(problem.key_bias.dtype)


# -- plans -------------------------------------------------------------------------------------------------------------


def plan_forward(
    problem: Problem,
    terms: Terms,
    out: torch.Tensor,
    lse: torch.Tensor,
    tma: bool = False,
    config: Config | None = None,
    capability: int | None = None,
) -> Launch:
    """Prepare the forward launch that fills ``out`` and ``lse``; ``capability`` is 90 for Hopper."""
    q, layout = problem.q, problem.layout
    dim = q.shape[-1]
    first, second = panels(dim)
    capability = _capability(q.device) if capability is None else capability
    config = config or forward_config(problem, terms, capability)
    bm, bn = tile_of(layout.q_block, config.rows), tile_of(layout.kv_block, config.columns)
    warps, stages = config.warps, config.stages
    tiles = layout.nq * (layout.q_block // bm)
    unit = _unit(q, problem.k, problem.v, out)
    arguments = {
        "q": q, "k": problem.k, "v": problem.v, "o": out, "lse": lse,
        **_strides(unit, q=q, k=problem.k, v=problem.v, o=out), "UNIT": unit,
        **_lists(layout), **_keys(problem), **_elements(layout), **_terms(problem, terms),
        "scale": problem.scale, "heads": q.shape[2], "ratio": problem.ratio, "tiles": tiles,
        "q_len": layout.q_len, "kv_len": layout.kv_len,
        "BM": bm, "BN": bn, "EN": min(bn, EDGE_COLUMNS), "BV": min(bn, POOLED_COLUMNS),
        "Q_SPLIT": layout.q_block // bm, "KV_SPLIT": layout.kv_block // bn,
        "DIM": dim, "D1": first, "D2": second, "RAGGED": layout.kv_len % layout.kv_block != 0,
        **_arithmetic(q.dtype), "LAZY": lazy_rescaling(problem, terms, capability), "TMA": tma and second == 0,
        "STAGES": stages,
        "EDGE_STAGES": 2 if q.dtype == torch.float32 else 1,  # fp32 operands must come from shared memory, or spill
    }  # fmt: skip
    return Launch(forward_kernel, tiles * q.shape[0] * q.shape[2], arguments, warps, stages)


def plan_block_stats(
    problem: Problem,
    statistic: str,
    pooled: Compensation | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    stats: torch.Tensor,
) -> Launch:
    """Prepare the launch that fills ``stats`` (B, H, tiles, nk), given the result of the forward pass."""
    q, layout = problem.q, problem.layout
    first, second = panels(q.shape[-1])
    config = stats_config(problem)
    comp = pooled if statistic == "error" else None
    terms = _terms(problem, Terms(compensation=comp))
    per_block = terms["COMP_PER_BLOCK"]
    unit = _unit(q, problem.k, problem.v, out)
    arguments = {
        "q": q, "k": problem.k, "v": problem.v, "o": out, "lse": lse, "stats": stats,
        **_strides(unit, q=q, k=problem.k, v=problem.v, o=out), "UNIT": unit, **_keys(problem),
        **{name: terms[name] for name in ("comp_k", "comp_v", "comp_bias", "cb_b", "cb_h", "nv")},
        "scale": problem.scale, "heads": q.shape[2], "ratio": problem.ratio, "tiles": stats.shape[2],
        "q_len": layout.q_len, "kv_len": layout.kv_len, "nk": layout.nk,
        "BM": config.rows, "BN": config.columns, "KV_SPLIT": layout.kv_block // config.columns,
        "BV": max(16, 1 << (per_block - 1).bit_length()), "PER_BLOCK": per_block,
        "DIM": q.shape[-1], "D1": first, "D2": second, "ERROR": statistic == "error", "POOLED": comp is not None,
        **{name: value for name, value in _arithmetic(q.dtype).items() if name != "INTERPRET"},
    }  # fmt: skip
    return Launch(block_stats_kernel, stats[..., 0].numel(), arguments, config.warps, config.stages)


def stats_config(problem: Problem) -> Config:
    """Return the configuration of the pass for statistics, in 16 bits: its sums of a block take registers."""
    layout = problem.layout
    if layout.kv_block % 128:
        return Config(tile_of(layout.q_block, 32), tile_of(layout.kv_block, 64), 4, 2)
    return Config(tile_of(layout.q_block, 64), 128, 8, 2)


def plan_backward(
    problem: Problem,
    out: torch.Tensor,
    lse: torch.Tensor,
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor,
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    dbias: torch.Tensor | None,
    capability: int | None = None,
    configs: tuple[Config, Config] | None = None,
) -> list[Launch]:
    """Prepare the three launches that fill the gradients, in order; ``capability`` is 90 for Hopper."""
    q, layout = problem.q, problem.layout
    dim, (first, second) = q.shape[-1], panels(q.shape[-1])
    capability = _capability(q.device) if capability is None else capability
    for_q, for_k = configs or backward_configs(problem, capability)
    batch, heads = q.shape[0], q.shape[2]
    padded = layout.nq * layout.q_block
    logs, delta = lse.new_empty(2, batch, heads, padded)
    rows = ceil_div(padded, 64)
    unit = _unit(q, problem.k, problem.v, grad_out, dq, dk, dv, out)
    before = Launch(
        row_kernel,
        rows * batch * heads,
        {
            "out": out, "grad": grad_out, "grad_lse": grad_lse, "lse": lse, "logs": logs, "delta": delta,
            **_strides(unit, o=out, g=grad_out), "UNIT": unit,
            "l_b": grad_lse.stride(0), "l_h": grad_lse.stride(1), "l_s": grad_lse.stride(2),
            "heads": heads, "q_len": layout.q_len, "padded": padded, "tiles": rows,
            "BM": 64, "DIM": dim, "D": 1 << (dim - 1).bit_length(),
        },
        4,
        2,
    )  # fmt: skip
    shared = {
        "q": q, "k": problem.k, "v": problem.v, "grad": grad_out, "logs": logs, "delta": delta,
        **_strides(unit, q=q, k=problem.k, v=problem.v, g=grad_out), "UNIT": unit,
        **_keys(problem), **_elements(layout),
        "scale": problem.scale, "heads": heads, "ratio": problem.ratio,
        "q_len": layout.q_len, "kv_len": layout.kv_len, "padded": padded,
        "DIM": dim, "D1": first, "D2": second, **_arithmetic(q.dtype), "EDGE_STAGES": 1,
    }  # fmt: skip
    cut = _cut(layout, for_q)
    tiles = layout.nq * cut["Q_SPLIT"]
    own = {"dq": dq, **_strides(unit, dq=dq), **_lists(layout), "tiles": tiles, **cut}
    queries = Launch(
        dq_kernel,
        tiles * batch * heads,
        {
            **shared, **own, "EN": min(cut["BN"], EDGE_COLUMNS), "RAGGED": layout.kv_len % layout.kv_block != 0,
            "FOLD": capability < 90,
        },
        for_q.warps,
        for_q.stages,
    )  # fmt: skip
    lists, cut = layout.reverse_lists(), _cut(layout, for_k)
    tiles = layout.nk * cut["KV_SPLIT"]
    own = {
        "dk": dk, "dv": dv, "dbias": dbias, **_strides(unit, dk=dk, dv=dv), "tiles": tiles, **cut,
        "EM": min(cut["BM"], EDGE_COLUMNS), "RAGGED": layout.q_len % layout.q_block != 0,
        "BIAS_GRAD": dbias is not None,
        "q_indices": lists.q_indices, "q_num_blocks": lists.q_num_blocks,
        "full_q_num_blocks": lists.full_q_num_blocks, "entries": lists.entry, "qcap": lists.q_indices.shape[-1],
        **_broadcast("i", lists.q_indices), **_broadcast("c", lists.q_num_blocks),
    }  # fmt: skip
    programs = tiles * batch * problem.k.shape[2]
    keys = Launch(dkv_kernel, programs, {**shared, **own}, for_k.warps, for_k.stages)
    return [before, queries, keys]


def _cut(layout: BlockLayout, config: Config) -> dict[str, int]:
    """Arguments that cut the blocks of a layout into tiles."""
    bm, bn = tile_of(layout.q_block, config.rows), tile_of(layout.kv_block, config.columns)
    cut = {"BM": bm, "BN": bn, "Q_SPLIT": layout.q_block // bm, "KV_SPLIT": layout.kv_block // bn}
    return {**cut, "STAGES": config.stages}


def forward_config(problem: Problem, terms: Terms, capability: int) -> Config:
    """Return the forward configuration of a call: the fewest instructions a key that fit without register spills.

    ``capability`` is 90 for Hopper. ``benchmarks/kernels/instructions.json`` has the instructions.
    """
    q, comp = problem.q, terms.compensation
    if q.dtype == torch.float32:
        return Config(32, 16, 8, 2)
    if terms.bias is not None or (comp is not None and comp.variance is not None):
        return Config(128, 32, 8, 2)  # these take registers
    if lazy_rescaling(problem, terms, capability) and _large_tiles(problem, capability):
        return Config(128, 128, 8, 3)
    return Config(128, 64, 8, 3 if q.shape[-1] > 64 or comp is not None else 4)


def lazy_rescaling(problem: Problem, terms: Terms, capability: int) -> bool:
    """Tell whether a stale maximum is used: nothing hides the first keys, and weights above 1 fit the dtype."""
    hidden = terms.bias is not None or problem.key_bias is not None or problem.key_mask is not None
    fits = capability >= 90 or problem.q.shape[-1] < 128  # two loops take more registers where products need them too
    return not hidden and problem.q.dtype == torch.bfloat16 and fits


def _large_tiles(problem: Problem, capability: int) -> bool:
    return capability >= 90 and panels(problem.q.shape[-1])[1] == 0 and problem.layout.kv_block % 128 == 0


def backward_configs(problem: Problem, capability: int) -> tuple[Config, Config]:
    """Return the backward configurations of a call, for q and for k and v; chosen as :func:`forward_config` chooses."""
    dim, layout, plain = problem.q.shape[-1], problem.layout, Config(64, 64, 8, 2)
    masked = layout.elements is not None or problem.key_mask is not None or problem.key_bias is not None
    if masked or panels(dim)[1] > 0 or problem.q.dtype == torch.float32:  # these take registers
        if dim < 128 and capability < 90:
            small = Config(32, 32, 4 if dim <= 64 else 8, 2)
            return small, small
        bits = isinstance(layout.elements, BitMask)  # the words of a tile's rows take registers too
        if masked and not bits and panels(dim)[1] == 0 and problem.q.dtype != torch.float32 and capability == 90:
            return Config(128, 64, 8, 2), plain
        return (Config(64, 32, 8, 2), Config(32, 64, 8, 2)) if masked else (plain, plain)
    if capability < 90:
        if dim <= 64:
            return Config(128, 64, 8, 2), Config(64, 128, 8, 2)
        return Config(128, 64, 8, 2), Config(128, 64, 8, 2) if capability == 80 else plain
    ragged = layout.q_len % layout.q_block != 0  # the loop for the last block takes registers
    rows = 128 if dim <= 64 else 32 if ragged and capability == 90 else 64
    return Config(128, 128, 8, 2), Config(rows, 128, 8, 2)


def _capability(device: torch.device) -> int:
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    if major == 12:  # consumer Blackwell multiplies as Ada does, with as little shared memory
        return 89
    return 10 * major + minor


def _unit(*tensors: torch.Tensor) -> int:
    """Elements that divide every stride: 16 bytes where possible, so that copies can be that wide."""
    wide = 16 // tensors[0].element_size()
    return wide if all(x.stride(i) % wide == 0 for x in tensors for i in range(3)) else 1


def _unit_stride(problem: Problem) -> Problem:
    """The same call with contiguous channels."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (problem.q, problem.k, problem.v))
    return replace(problem, q=q, k=k, v=v)


def _arithmetic(dtype: torch.dtype) -> dict[str, Any]:
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    return {"PRECISION": "tf32" if tf32 else "ieee", "UPCAST": INTERPRET and dtype == torch.bfloat16,
            "INTERPRET": INTERPRET}  # fmt: skip


def _strides(unit: int, **tensors: torch.Tensor) -> dict[str, int]:
    """Batch, sequence and head strides of (B, S, H, D) tensors in units, under ``name_b``, ``name_s``, ``name_h``."""
    named: dict[str, int] = {}
    for name, x in tensors.items():
        named |= {f"{name}_{axis}": x.stride(i) // unit for i, axis in enumerate("bsh")}
    return named


def _broadcast(name: str, x: torch.Tensor | None) -> dict[str, int]:
    """Batch and head strides of a (B|1, H|1, ...) tensor: 0 along a dimension of size 1."""
    if x is None:
        return {f"{name}_b": 0, f"{name}_h": 0}
    return {f"{name}_{axis}": x.stride(i) if x.shape[i] > 1 else 0 for i, axis in enumerate("bh")}


def _lists(layout: BlockLayout) -> dict[str, Any]:
    idx, cnt = layout.kv_indices.contiguous(), layout.kv_num_blocks.contiguous()
    full = None if layout.full_kv_num_blocks is None else layout.full_kv_num_blocks.contiguous()
    return {"kv_indices": idx, "kv_num_blocks": cnt, "full_kv_num_blocks": full, "kcap": idx.shape[-1],
            **_broadcast("i", idx), **_broadcast("c", cnt)}  # fmt: skip


def _keys(problem: Problem) -> dict[str, Any]:
    mask, bias = problem.key_mask, problem.key_bias
    mask = None if mask is None else mask.contiguous().view(torch.uint8)
    bias = None if bias is None else bias.to(torch.float32).contiguous()
    return {
        "key_mask": mask, "KEY_MASK": mask is not None, "km_b": 0 if mask is None else mask.stride(0),
        "key_bias": bias, "KEY_BIAS": bias is not None, **_broadcast("kb", bias),
    }  # fmt: skip


def _elements(layout: BlockLayout) -> dict[str, Any]:
    mask = layout.elements
    numbers = (0,) * NUMBERS if mask is None else mask.numbers()
    a, b = (None, None) if mask is None else mask.tensors()
    a, b = (None if x is None else x.contiguous() for x in (a, b))
    spare = None if mask is None else layout.kv_num_blocks  # an unused pointer, where the kind has no table
    per_head = mask is not None and mask.kind == BitMask.kind
    return {
        "ELEMENTS": 0 if mask is None else mask.kind,
        "ma": spare if a is None else a, "ma_b": _broadcast("m", a)["m_b"],
        "ma_h": _broadcast("m", a)["m_h"] if per_head else 0,
        "mb": spare if b is None else b, "mb_b": _broadcast("m", b)["m_b"],
        **{f"n{i}": numbers[i] for i in range(NUMBERS)},
    }  # fmt: skip


def _terms(problem: Problem, terms: Terms) -> dict[str, Any]:
    """Arguments of the optional terms; ``None`` and 0 where a term is absent."""
    bias, comp, end, layout = terms.bias, terms.compensation, terms.epilogue, problem.layout
    bq, bk = (None, None) if bias is None else (x.to(torch.float32).contiguous() for x in (bias.q, bias.k))
    named: dict[str, Any] = {
        "key_len": terms.key_lengths, "KEY_LEN": terms.key_lengths is not None,
        "bias_q": bq, "bias_k": bk, "RANK": 0 if bq is None else bq.shape[-1],
        **_broadcast("bq", bq), **_broadcast("bk", bk),
        "COMP": comp is not None, "COMP_PER_BLOCK": 1 if comp is None else layout.kv_block // comp.tokens,
        "COMP_VAR": comp is not None and comp.variance is not None, "var_cap": 0.0 if comp is None else comp.cap,
    }  # fmt: skip
    weight = None if comp is None else _padded_weight(comp.log_weight)
    bits = None if comp is None else selected_bits(layout)
    for name in ("k", "v", "variance"):
        x = None if comp is None else getattr(comp, name)
        x = None if x is None else x.to(problem.q.dtype).contiguous()  # products are of equal types
        named["comp_var" if name == "variance" else f"comp_{name}"] = x
    rank = None if comp is None or comp.bias is None else comp.bias.to(torch.float32).contiguous()
    named |= {
        "comp_rank": rank, "COMP_RANK": rank is not None, **_broadcast("cr", rank),
        "comp_bias": weight, **_broadcast("cb", weight), "nv": 0 if comp is None else comp.k.shape[2],
        "comp_bits": bits, **_broadcast("bits", bits), "words": 0 if bits is None else bits.shape[-1],
    }  # fmt: skip
    given = {name: None if end is None else getattr(end, name) for name in ("row_scale", "lse_ref", "add", "blend")}
    given = {name: None if x is None else x.to(torch.float32).contiguous() for name, x in given.items()}
    blend = given["blend"]
    return named | {
        "row_scale": given["row_scale"], "ROW_SCALE": given["row_scale"] is not None,
        **_broadcast("rs", given["row_scale"]),
        "row_add": given["add"], "ROW_ADD": given["add"] is not None, **_broadcast("ra", given["add"]),
        "lse_ref": given["lse_ref"], "LSE_REF": given["lse_ref"] is not None, "cap": 0.0 if end is None else end.cap,
        "blend": blend, "BLEND": blend is not None,
        "bl_b": 0 if blend is None or blend.shape[0] == 1 else blend.stride(0),
        "value_shift": 0 if end is None else end.value_shift,
    }  # fmt: skip


def _padded_weight(log_weight: torch.Tensor) -> torch.Tensor:
    """Turn weights of pooled keys into base 2, with ``-inf`` up to whole steps of the loop over them."""
    count = log_weight.shape[-1]
    padded = log_weight.new_full(
        (*log_weight.shape[:-1], ceil_div(count, POOLED_COLUMNS) * POOLED_COLUMNS), -math.inf, dtype=torch.float32
    )
    padded[..., :count] = log_weight * math.log2(math.e)
    return padded


def let_kernels_allocate() -> None:
    """Let Triton allocate through torch the workspace that descriptors created in a kernel need."""
    import triton

    triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device="cuda"))
