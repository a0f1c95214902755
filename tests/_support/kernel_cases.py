"""Attention calls for the tests of every backend: ragged, grouped, with empty rows, with every optional term."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from dit_attn.kernels import device
from dit_attn.kernels.backends.gather import head_groups
from dit_attn.kernels.backends.reference import reference_attention
from dit_attn.kernels.functional import sparse_attention
from dit_attn.kernels.layouts import flex_mask, patterns, windows
from dit_attn.kernels.layouts.block_layout import BlockLayout
from dit_attn.kernels.layouts.token_order import token_order
from dit_attn.kernels.problem import Problem
from dit_attn.kernels.terms import (
    BAR,
    NO_TERMS,
    Compensation,
    Epilogue,
    LogitBias,
    Terms,
    key_value_covariance,
    pooled_bias,
    pooled_compensation,
    sampled_compensation,
)

Q_LEN, KV_LEN, HEADS, KEY_HEADS = 70, 90, 4, 2


@contextmanager
def tight(on: bool = True) -> Iterator[None]:
    """A CPU on which everything is too large: heads are gathered in place, and completed block by block."""
    with pytest.MonkeyPatch.context() as patch:
        if on:
            patch.setattr(device, "CHUNK_SIZES", {"cpu": device.ChunkSizes(chunk=1, group=0, pooled=1)})
            patch.setattr(head_groups, "COPY_LIMIT", 0.0)
        yield


def call(
    dtype: torch.dtype = torch.float32,
    dim: int = 16,
    q_block: int = 32,
    kv_block: int = 32,
    key_mask: bool = False,
    key_bias: bool = False,
    layout: BlockLayout | None = None,
    seed: int = 0,
) -> Problem:
    """A problem of two batch rows; without a ``layout``, half of the blocks of every head, and no block for one row."""
    rng = torch.Generator().manual_seed(seed)
    q_len, kv_len = (Q_LEN, KV_LEN) if layout is None else (layout.q_len, layout.kv_len)
    q = torch.randn(2, q_len, HEADS, dim, generator=rng).to(dtype)
    k, v = (torch.randn(2, kv_len, KEY_HEADS, dim, generator=rng).to(dtype) for _ in range(2))
    if layout is None:
        blocks = torch.rand(2, HEADS, -(-q_len // q_block), -(-kv_len // kv_block), generator=rng) < 0.5
        blocks[0, 1, 0] = False
        layout = BlockLayout.from_mask(blocks, q_len, kv_len, q_block, kv_block)
    mask = torch.rand(2, kv_len, generator=rng) < 0.8 if key_mask else None
    bias = torch.randn(1, HEADS, kv_len, generator=rng) if key_bias else None
    return Problem(q, k, v, layout, 0.7 * dim**-0.5, mask, bias)


def bits_layout(q_block: int = 32, kv_block: int = 32) -> BlockLayout:
    """A layout with bits: a band with holes, per head."""
    from torch.nn.attention.flex_attention import create_block_mask

    def rule(b: Any, h: Any, q: Any, k: Any) -> Any:
        return ((q - k).abs() <= 10 + h * 20) & (k % 5 != 0)

    mask = create_block_mask(rule, 2, HEADS, Q_LEN, KV_LEN, device="cpu", BLOCK_SIZE=(q_block, kv_block))
    return flex_mask.from_flex(mask)


def holds(layout: BlockLayout, pairs: torch.Tensor) -> None:
    """Assert that a layout has exactly ``pairs`` (.., Sq, Sk); partial blocks are neither empty nor full."""
    layout.check()
    lead = layout.kv_num_blocks.shape[:2]
    assert torch.equal(layout.materialize(), pairs.expand(*lead, -1, -1))
    queries, keys = -(-layout.q_len // layout.q_block), -(-layout.kv_len // layout.kv_block)
    for row in range(queries):
        for column in range(keys):
            tile = pairs[..., row * layout.q_block :, column * layout.kv_block :]
            tile = tile[..., : layout.q_block, : layout.kv_block].flatten(-2)
            assert torch.equal(layout.block_mask()[..., row, column], tile.any(-1).expand(lead))
            assert torch.equal(layout.full_mask()[..., row, column], tile.all(-1).expand(lead))
    assert abs(layout.token_density - float(pairs.double().mean())) < 1e-12


LAYOUTS: dict[str, Callable[[], BlockLayout]] = {
    "window": lambda: windows.inward_window((2, 5, 7), (2, 3, 4), q_block=32, kv_block=16, text_before=4),
    "cut window": lambda: windows.inward_window((8, 9), (3, 4), q_block=16, kv_block=32, inward=False),
    "window in tiles": lambda: windows.inward_window(
        (2, 6, 5),
        (None, 3, 4),
        order=token_order("tiles", (2, 6, 5), tile=(2, 4, 4)),
        stride=(1, 2, 1),
        q_block=16,
        kv_block=16,
        text_after=5,
        text_rows=False,
    ),
    "band": lambda: patterns.band(Q_LEN, KV_LEN, 9, 5, sinks=6, q_shift=3, q_block=32, kv_block=32),
    "sinks": lambda: patterns.sink_window(80, 20, 33, q_block=16, kv_block=16),
    "segments": lambda: patterns.from_segments(
        torch.tensor([[0] * 30 + [1] * 40, [2] * 64 + [5] * 6]),
        torch.tensor([[0] * 33 + [1] * 57, [2] * 50 + [5] * 40]),
        q_block=32,
        kv_block=32,
    ),
    "bits": bits_layout,
}


def _epilogue(p: Problem, **given: Any) -> Terms:
    rng = torch.Generator().manual_seed(3)
    rows = {
        "row_scale": torch.rand(2, HEADS, p.layout.nq, generator=rng),
        "lse_ref": torch.randn(2, HEADS, Q_LEN, generator=rng) + 3,
        "add": torch.randn(1, HEADS, p.layout.nq, p.q.shape[-1], generator=rng),
        "blend": torch.tensor([[0.0, 0.3, 1.0, 0.7]]),
    }
    return Terms(epilogue=Epilogue(**{name: rows[name] for name in rows if name in given}, cap=0.2, value_shift=5))


def _bias(p: Problem) -> Terms:
    rng = torch.Generator().manual_seed(4)
    return Terms(bias=LogitBias(torch.randn(1, 4, 70, 3, generator=rng), torch.randn(2, 1, 90, 3, generator=rng)))


def _barred(p: Problem) -> Terms:
    """A bias and its pooled keys; some rows are barred from some keys, some from all."""
    bias = _bias(p).bias
    assert bias is not None
    rows, keys = torch.zeros(1, 4, 70, 2), torch.zeros(2, 1, 90, 2)
    rows[:, :, 15:50, 0] = rows[:, 1:, 40:44, 1] = BAR
    keys[0, :, 21:64, 0] = keys[..., 1] = 1.0
    bias = LogitBias(torch.cat([bias.q, rows], -1), torch.cat([bias.k, keys], -1))
    comp = pooled_compensation(p.k, p.v, 8, key_mask=p.key_mask)
    return Terms(bias=bias, compensation=replace(comp, bias=pooled_bias(bias.k, 8, p.key_mask)))


def _without_some(p: Problem, pooled: Compensation) -> Compensation:
    """The same pooled keys, but for those of every third skipped block."""
    skipped = ~p.layout.block_mask()
    third = (torch.arange(skipped.numel()) % 3 == 0).view_as(skipped)
    return replace(pooled, left_out=skipped & third)


TERMS: dict[str, Callable[[Problem], Terms]] = {
    "none": lambda p: NO_TERMS,
    "lengths": lambda p: Terms(key_lengths=torch.tensor([90, 37], dtype=torch.int32)),
    "bias": _bias,
    "barred keys": lambda p: Terms(bias=_barred(p).bias),
    "barred pooled keys": _barred,
    "compensation": lambda p: Terms(compensation=pooled_compensation(p.k, p.v, 8)),
    "sampled keys": lambda p: Terms(
        compensation=sampled_compensation(p.k, p.v, 8, torch.arange(p.k.shape[2]) * 5, key_mask=p.key_mask)
    ),
    "variance": lambda p: Terms(compensation=pooled_compensation(p.k, p.v, 16, variance=True)),
    "left out": lambda p: Terms(compensation=_without_some(p, pooled_compensation(p.k, p.v, 8))),
    "first order": lambda p: Terms(
        compensation=replace(
            pooled_compensation(p.k, p.v, 8, variance=True), first_order=key_value_covariance(p.k, p.v, 8)
        )
    ),
    "row scale": lambda p: _epilogue(p, row_scale=1),
    "denominator": lambda p: _epilogue(p, lse_ref=1),
    "add": lambda p: _epilogue(p, add=1),
    "blend": lambda p: _epilogue(p, blend=1),
    "everything": lambda p: Terms(
        torch.tensor([80, 64], dtype=torch.int32), _bias(p).bias, pooled_compensation(p.k, p.v, 8),
        _epilogue(p, row_scale=1, lse_ref=1, add=1, blend=1).epilogue,
    ),
}  # fmt: skip


def assert_formulas(
    backend: str, dtype: torch.dtype, dim: int, altered: bool, tolerance: float, lse_tolerance: float
) -> None:
    """Hold a backend against fp64 formulas, with key mask and key bias where ``altered``.

    Ragged lengths, grouped heads, different counts, rows without blocks, rows whose keys are all masked, NaN that is.
    """
    rng = torch.Generator().manual_seed(0)
    q = torch.randn(2, 70, 4, dim, generator=rng).to(dtype)
    k, v = (torch.randn(2, 90, 2, dim, generator=rng).to(dtype) for _ in range(2))
    blocks = torch.rand(2, 4, 5, 6, generator=rng) < 0.5
    blocks[0, 1, 2], blocks[1, :, 0], blocks[1, :, 0, 0] = False, False, True
    layout = BlockLayout.from_mask(blocks, 70, 90, 16, 16)
    terms: dict[str, Any] = {"key_mask": None, "key_bias": None}
    if altered:
        mask = torch.rand(2, 90, generator=rng) < 0.8
        mask[1, :16] = False
        v[1, :16] = torch.nan
        terms = {"key_mask": mask, "key_bias": torch.randn(2, 4, 90, generator=rng)}
    out, lse = sparse_attention(q, k, v, layout, return_lse=True, backend=backend, **terms)
    wide = (x.double().nan_to_num() for x in (q, k, v))
    good, good_lse = reference_attention(*wide, layout, scale=dim**-0.5, **terms)
    torch.testing.assert_close(out.double(), good, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.double(), good_lse, rtol=lse_tolerance, atol=lse_tolerance)
    assert bool((out[0, 32:48, 1] == 0).all()) and bool((lse[0, 1, 32:48] == -torch.inf).all())


def assert_gradients_of_gather(backend: str) -> None:
    """Hold the gradients of a backend against those of ``gather``."""
    q, k, v = (torch.randn(1, 40, 2, 8, requires_grad=True) for _ in range(3))
    layout = BlockLayout.from_mask(torch.rand(1, 2, 3, 3) < 0.7, 40, 40, 16, 16)
    found, expected = (
        torch.autograd.grad(sparse_attention(q, k, v, layout, backend=name).square().sum(), (q, k, v))  # type: ignore
        for name in (backend, "gather")
    )
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
