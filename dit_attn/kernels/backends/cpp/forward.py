"""Block-sparse attention by the compiled C++ kernel."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F

from dit_attn.errors import DitAttnError
from dit_attn.kernels.backends.compose_terms import with_terms_in_place
from dit_attn.kernels.backends.cpp import library
from dit_attn.kernels.backends.gather.threads import LARGE
from dit_attn.kernels.backends.gather.workspace import Workspace, borrow_workspace
from dit_attn.kernels.problem import NEG_INF, Problem
from dit_attn.kernels.terms import Compensation, Terms

COLUMNS = 512  # logits of a row at a time: with 128 queries, they and their weights fit a second-level cache
WIDEST = 32  # floats that a loop of the kernel takes at a time, at most
GROUP = 8 << 20  # bytes of packed keys and values at a time; a longer head is taken alone


class _Keys(ctypes.Structure):
    """Keys and values in blocks, field by field as in ``block_sparse.cpp``."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("k", "v", "packed_k", "packed_v")),
        *((name, ctypes.c_int64) for name in ("k_token", "k_head", "v_token", "v_head", "length", "block", "blocks")),
    ]


_POINTERS = ("q", "out", "lse", "index", "count", "exists", "bias", "weight", "left_out", "stand_in", "stats", "next")
_NUMBERS = (
    "q_token", "q_head", "out_token", "out_head",
    "index_head", "index_row", "count_head", "bias_head", "weight_head", "left_out_head",
    "stand_in_head", "stand_in_token",
    "heads", "groups", "sq", "d", "q_block", "nq", "at_once", "pooled_per_block", "errors",
)  # fmt: skip


class _Call(ctypes.Structure):
    """One batch row and some of its heads, field by field as in ``block_sparse.cpp``."""

    _fields_ = [
        ("keys", _Keys),
        ("pooled", _Keys),
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in _NUMBERS),
        ("scale", ctypes.c_float),
    ]


def cpp_with_terms(problem: Problem, terms: Terms) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute (o, lse) of a call with optional terms; pooled keys without further terms in the same pass.

    Args:
        problem: the call, fp32 or bf16, without a low-rank bias or an element mask.
        terms: its terms, without a bias.
    """
    comp = terms.compensation
    if comp is None or comp.variance is not None or comp.first_order is not None:
        return with_terms_in_place(problem, terms, cpp_attention)
    return with_terms_in_place(problem, replace(terms, compensation=None), partial(cpp_attention, pooled=comp))


def cpp_block_stats(
    problem: Problem, statistic: str, pooled: Compensation | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute o and lse of a call, and what every block contributes (B, H, nq, nk), in a second pass over the keys.

    Args:
        problem: a call over all blocks, as :func:`cpp_attention` takes it.
        statistic: ``mass`` or ``error``.
        pooled: keys that stand in for a block; its error is then that of leaving it to them.

    Raises:
        DitAttnError: memory is short.
    """
    layout, (batch, _, heads, _) = problem.layout, problem.q.shape
    stats = torch.empty(batch, heads, layout.nq, layout.nk)
    return (*_computed(problem, pooled if statistic == "error" else None, stats, statistic), stats)


def cpp_attention(problem: Problem, pooled: Compensation | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute o (B, Sq, H, D) in q's dtype and lse (B, H, Sq) fp32, natural logarithm.

    Keys and values are copied, packed, a group of heads at a time.

    Args:
        problem: the call, fp32 or bf16, without a low-rank bias or an element mask.
        pooled: keys that stand for those of skipped blocks, without variance, first-order term and bias.

    Raises:
        DitAttnError: memory is short.
    """
    return _computed(problem, pooled)


def _computed(
    problem: Problem, pooled: Compensation | None, stats: torch.Tensor | None = None, statistic: str = ""
) -> tuple[torch.Tensor, torch.Tensor]:
    q, layout = _rows(problem.q), problem.layout
    out = torch.empty(q.shape, dtype=q.dtype)
    lse = torch.full((q.shape[0], q.shape[2], q.shape[1]), NEG_INF)
    counter = torch.zeros(1, dtype=torch.int64)
    tables = {
        "index": layout.kv_indices, "count": layout.kv_num_blocks, "bias": problem.key_bias,
        "weight": None if pooled is None else pooled.log_weight,
        "left_out": None if pooled is None else pooled.left_out,
    }  # fmt: skip
    tables = {name: None if x is None else _plain(x).contiguous() for name, x in tables.items()}
    mask = None if problem.key_mask is None else problem.key_mask.contiguous()
    stand_in = None
    if stats is not None and pooled is not None:  # rows as long as the widest vectors take them
        stand_in = F.pad(pooled.v.float(), (0, -pooled.v.shape[-1] % WIDEST)).contiguous()
    sources = [(_rows(problem.k), _rows(problem.v), layout.kv_block)]
    if pooled is not None:
        length = pooled.k.shape[2]
        block = min(length + length % 2, COLUMNS)
        k, v = (_rows(x.to(q.dtype).transpose(1, 2)) for x in (pooled.k, pooled.v))
        sources.append((k, v, block))
    with borrow_workspace() as workspace:
        for b, g0, g1 in _groups(problem):
            heads = slice(g0 * problem.ratio, g1 * problem.ratio)
            keys = [
                _keys(k[b, :, g0:g1], v[b, :, g0:g1], block, name, workspace)
                for name, (k, v, block) in zip(("packed", "packed pooled"), sources)
            ]
            views = {"q": q[b, :, heads], "out": out[b, :, heads]}
            own = {name: _heads(x, b, heads) for name, x in tables.items()}
            index = own["index"]
            assert index is not None
            values = None if stand_in is None else stand_in[b, g0:g1]
            tensors = {
                **views, **own, "lse": lse[b, heads], "exists": None if mask is None else mask[b],
                "stand_in": values, "stats": None if stats is None else stats[b, heads], "next": counter,
            }  # fmt: skip
            call = _Call(
                **dict(zip(("keys", "pooled"), keys)),
                **{name: None if x is None else x.data_ptr() for name, x in tensors.items()},
                **{f"{name}_token": x.stride(0) for name, x in views.items()},
                **{f"{name}_head": x.stride(1) for name, x in views.items()},
                **{f"{name}_head": _stride(x) for name, x in own.items()},
                index_row=index.stride(1), heads=heads.stop - heads.start, groups=g1 - g0, sq=layout.q_len,
                d=q.shape[-1], q_block=layout.q_block, nq=layout.nq, at_once=max(1, COLUMNS // layout.kv_block),
                pooled_per_block=1 if pooled is None else layout.kv_block // pooled.tokens, scale=problem.scale,
                stand_in_head=0 if values is None else values.stride(0), errors=statistic == "error",
                stand_in_token=0 if values is None else values.stride(1),
            )  # fmt: skip
            _run(call, library.TYPES[q.dtype], torch.get_num_threads() if out[b].numel() > LARGE else 1)
    return out, lse


def _rows(x: torch.Tensor) -> torch.Tensor:
    """The same tensor, with channels side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _plain(x: torch.Tensor) -> torch.Tensor:
    """A table in the type that the kernel takes: fp32, int32 or bool."""
    if x.dtype == torch.bool:
        return x
    return x.float() if x.is_floating_point() else x.int()


def _groups(problem: Problem) -> Iterator[tuple[int, int, int]]:
    """The batch row, the first key head and the last of what is packed at a time."""
    layout, heads = problem.layout, problem.k.shape[2]
    a_head = 2 * layout.nk * layout.kv_block * problem.q.shape[-1] * problem.q.itemsize
    step = max(1, GROUP // a_head)
    for b in range(len(problem.k)):
        for g in range(0, heads, step):
            yield b, g, min(g + step, heads)


def _keys(k: torch.Tensor, v: torch.Tensor, block: int, name: str, workspace: Workspace) -> _Keys:
    """Keys and values (tokens, heads, D) and the memory that they are packed into."""
    length, heads, dim = k.shape
    blocks = -(-length // block)
    to = [workspace.get(f"{name} {each}", k.dtype, k.device, heads * blocks * block * dim) for each in "kv"]
    pointers = (x.data_ptr() for x in (k, v, *to))
    return _Keys(*pointers, k.stride(0), k.stride(1), v.stride(0), v.stride(1), length, block, blocks)


def _run(call: _Call, kind: int, threads: int) -> None:
    loaded = library.library()
    assert loaded is not None  # else the backend says that it is not built
    state = loaded.dit_attn_compute(ctypes.byref(call), kind, threads)
    if state:
        said = "memory is short" if state == 2 else "torch's micro-kernel refused it"
        raise DitAttnError(f"the C++ kernel could not compute a call: {said}; use backend='gather'")


def _heads(x: torch.Tensor | None, b: int, heads: slice) -> torch.Tensor | None:
    """(heads|1, ...) of a batch row and of some heads of a (B|1, H|1, ...) tensor."""
    if x is None:
        return None
    x = x[b if x.shape[0] > 1 else 0]
    return x if x.shape[0] == 1 else x[heads]


def _stride(x: torch.Tensor | None) -> int:
    """Elements from head to head of a (H|1, ...) tensor, 0 where all share one."""
    return 0 if x is None or x.shape[0] == 1 else x.stride(0)
