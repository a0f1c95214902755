"""Block-sparse attention by the compiled C++ kernel."""

from __future__ import annotations

import ctypes

import torch

from dit_attn.errors import DitAttnError
from dit_attn.kernels.backends.cpp import library
from dit_attn.kernels.backends.gather.threads import LARGE, run_shared
from dit_attn.kernels.backends.gather.workspace import borrow_workspace
from dit_attn.kernels.problem import NEG_INF, Problem

COLUMNS = 512  # logits of a row at a time: with 128 queries, they and their weights fit a second-level cache
GROUP = 8 << 20  # bytes of packed keys and values at a time; a longer head is taken alone
_POINTERS = ("q", "k", "v", "out", "lse", "packed_k", "packed_v", "index", "count", "exists", "bias", "next")
_NUMBERS = (
    "q_token", "q_head", "k_token", "k_head", "v_token", "v_head", "out_token", "out_head",
    "index_head", "index_row", "count_head", "bias_head",
    "heads", "groups", "sq", "sk", "d", "q_block", "kv_block", "nq", "nk", "at_once",
)  # fmt: skip


class _Call(ctypes.Structure):
    """One batch row, field by field as in ``block_sparse.cpp``."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in _NUMBERS),
        ("scale", ctypes.c_float),
    ]


def cpp_attention(problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute o (B, Sq, H, D) in q's dtype and lse (B, H, Sq) fp32, natural logarithm.

    Keys and values are copied, packed, a group of heads at a time.

    Args:
        problem: the call, fp32 or bf16, without a low-rank bias or an element mask.

    Raises:
        DitAttnError: memory is short.
    """
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (problem.q, problem.k, problem.v))
    layout, ratio = problem.layout, problem.ratio
    out = torch.empty(q.shape, dtype=q.dtype)
    lse = torch.full((q.shape[0], q.shape[2], q.shape[1]), NEG_INF)
    index, count = layout.kv_indices.contiguous(), layout.kv_num_blocks.contiguous()
    mask = None if problem.key_mask is None else problem.key_mask.contiguous()
    bias = None if problem.key_bias is None else problem.key_bias.float().contiguous()
    a_head = layout.nk * layout.kv_block * q.shape[-1]
    step = max(1, GROUP // (2 * a_head * q.itemsize))
    groups = [(b, g, min(g + step, k.shape[2])) for b in range(len(k)) for g in range(0, k.shape[2], step)]
    counter = torch.zeros(1, dtype=torch.int64)
    with borrow_workspace() as workspace:
        for b, g0, g1 in groups:
            packed = [workspace.get(name, q.dtype, q.device, (g1 - g0) * a_head) for name in ("packed k", "packed v")]
            heads = slice(g0 * ratio, g1 * ratio)
            own_index, own_count = (x[b if x.shape[0] > 1 else 0] for x in (index, count))
            own_bias = None if bias is None else bias[b if bias.shape[0] > 1 else 0]
            views = {"q": q[b, :, heads], "k": k[b, :, g0:g1], "v": v[b, :, g0:g1], "out": out[b, :, heads]}
            tensors = {
                **views, "lse": lse[b, heads], "packed_k": packed[0], "packed_v": packed[1],
                "index": _heads(own_index, heads), "count": _heads(own_count, heads),
                "exists": None if mask is None else mask[b], "bias": _heads(own_bias, heads), "next": counter,
            }  # fmt: skip
            numbers = {
                **{f"{name}_token": x.stride(0) for name, x in views.items()},
                **{f"{name}_head": x.stride(1) for name, x in views.items()},
                "index_head": _stride(own_index), "index_row": own_index.stride(1), "count_head": _stride(own_count),
                "bias_head": _stride(own_bias), "heads": (g1 - g0) * ratio, "groups": g1 - g0,
                "sq": layout.q_len, "sk": layout.kv_len, "d": q.shape[-1], "q_block": layout.q_block,
                "kv_block": layout.kv_block, "nq": layout.nq, "nk": layout.nk,
                "at_once": max(1, COLUMNS // layout.kv_block),
            }  # fmt: skip
            pointers = {name: None if x is None else x.data_ptr() for name, x in tensors.items()}
            call = _Call(**pointers, **numbers, scale=problem.scale)
            for work in ("dit_attn_pack", "dit_attn_attend"):
                counter.zero_()
                _run(work, call, library.TYPES[q.dtype], at_once=out[b].numel() > LARGE)
    return out, lse


def _run(work: str, call: _Call, kind: int, at_once: bool) -> None:
    loaded = library.library()
    assert loaded is not None  # else the backend says that it is not built
    function = getattr(loaded, work)
    states: list[int] = []
    run_shared(lambda: states.append(function(ctypes.byref(call), kind)), at_once)
    if any(states):
        said = "memory is short" if 2 in states else "torch's micro-kernel refused it"
        raise DitAttnError(f"the C++ kernel could not compute a call: {said}; use backend='gather'")


def _heads(x: torch.Tensor | None, heads: slice) -> torch.Tensor | None:
    """The rows of some heads of a (H|1, ...) tensor."""
    return x if x is None or x.shape[0] == 1 else x[heads]


def _stride(x: torch.Tensor | None) -> int:
    """Elements from head to head of a (H|1, ...) tensor, 0 where all share one."""
    return 0 if x is None or x.shape[0] == 1 else x.stride(0)
