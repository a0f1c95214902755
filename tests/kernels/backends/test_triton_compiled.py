"""The attention kernels as the compiler leaves them, for GPUs that need not be there: every shipped configuration."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from dit_attn.kernels import BlockLayout, from_segments, inward_window
from dit_attn.kernels.backends.triton.attention import (
    _capability,
    backward_configs,
    forward_config,
    lazy_rescaling,
    plan_backward,
    plan_block_stats,
    plan_forward,
    stats_config,
)
from dit_attn.kernels.layouts.patterns import from_rule
from dit_attn.kernels.problem import Problem
from dit_attn.kernels.selection import triton_select
from dit_attn.kernels.terms import NO_TERMS, Epilogue, LogitBias, Terms, pooled_compensation
from dit_attn.kernels.triton_launch import Launch
from tests._support.compiled_kernels import SHARED_MEMORY, Compiled, compile_for
from tests._support.dense_attention_kernel import plan_dense
from tests._support.instruction_table import OUTPUT, gradient_launches, plain_problem, sparse_launch
from tests._support.kernel_loop import inner_loop, key_loops

SEQ, HEADS = 1032, 2  # ragged, so that the second loop is there


def problem(dtype: torch.dtype, dim: int, seq: int = SEQ, layout: BlockLayout | None = None) -> Problem:
    q = torch.zeros(1, seq, HEADS, dim, dtype=dtype)
    return Problem(q, q, q, layout or BlockLayout.dense(seq, seq), dim**-0.5, None, None)


def forward(p: Problem, terms: Terms = NO_TERMS, tma: bool = False, capability: int = 90) -> Launch:
    stats = torch.empty(1, HEADS, p.q.shape[1])
    return plan_forward(p, terms, torch.empty_like(p.q), stats, tma, capability=capability)


def everything(dim: int, capability: int) -> Launch:
    p = problem(torch.bfloat16, dim)
    rows = p.layout.nq
    bias = LogitBias(torch.zeros(1, HEADS, SEQ, 3), torch.zeros(1, HEADS, SEQ, 3))
    end = Epilogue(
        row_scale=torch.ones(1, HEADS, rows), lse_ref=torch.zeros(1, HEADS, SEQ),
        add=torch.zeros(1, HEADS, rows, dim), blend=torch.zeros(1, HEADS),
    )  # fmt: skip
    lengths = torch.ones(1, dtype=torch.int32)
    terms = Terms(lengths, bias, pooled_compensation(p.k, p.v, 16, variance=True), end)
    return forward(p, terms, capability=capability)


def compensated(dim: int, variance: bool = False) -> tuple[Problem, Terms]:
    p = problem(torch.bfloat16, dim)
    return p, Terms(compensation=pooled_compensation(p.k, p.v, 16, variance=variance))


def windowed(dim: int) -> Problem:
    layout = inward_window((4, 16, 16), (3, 9, 9), text_after=8)
    return problem(torch.bfloat16, dim, layout.q_len, layout)


FORWARD: dict[str, Callable[[], tuple[Problem, Terms]]] = {
    **{f"bf16 {dim}": lambda dim=dim: (problem(torch.bfloat16, dim), NO_TERMS) for dim in (64, 72, 96, 128)},
    "full blocks only": lambda: (problem(torch.bfloat16, 128, 1024), NO_TERMS),
    "fp16 128": lambda: (problem(torch.float16, 128), NO_TERMS),
    "fp32 128": lambda: (problem(torch.float32, 128), NO_TERMS),
    "window 128": lambda: (windowed(128), NO_TERMS),
    "lengths 128": lambda: (problem(torch.bfloat16, 128), Terms(torch.ones(1, dtype=torch.int32))),
    "compensation 128": lambda: compensated(128),
    "compensation 64": lambda: compensated(64),
    "variance 128": lambda: compensated(128, True),
}


def test_a_change_of_density_changes_nothing_that_triton_compiles_for() -> None:
    launches = []
    for chosen in (1, 16):
        scores = torch.randn(1, HEADS, 17, 17)
        layout = BlockLayout.from_topk(scores, chosen, q_len=2100, kv_len=2100, q_block=128, kv_block=128)
        p = problem(torch.bfloat16, 128, 2100, layout)
        comp = Terms(compensation=pooled_compensation(p.k, p.v, 16))
        stats = torch.empty(1, HEADS, 2100)
        lists = triton_select._lists(p.q.transpose(1, 2)[:, :, :17], 17, None, chosen, None, False)
        choice = triton_select.plan_select(None, scores, None, (chosen, None, None, None), 1.0, lists)
        gradients = plan_backward(p, p.q, stats, p.q, stats, p.q, p.q, p.q, None)
        launches.append([forward(p), forward(p, comp), *gradients, choice])
    for few, many in zip(*launches):
        assert (few.kernel, few.warps, few.stages) == (many.kernel, many.warps, many.stages)
        for parameter in few.kernel.params:
            a, b = few.arguments[parameter.name], many.arguments[parameter.name]
            if isinstance(a, (int, float)) and a != b:
                assert parameter.do_not_specialize and not parameter.is_constexpr, parameter.name


def backward(p: Problem, capability: int) -> list[Launch]:
    q, stats = p.q, torch.empty(1, HEADS, p.q.shape[1])
    return plan_backward(p, q, stats, q, stats, q, q, q, None if p.key_bias is None else stats, capability)


def fits(compiled: Compiled, capability: int) -> None:
    assert compiled.shared <= SHARED_MEMORY[capability]
    assert compiled.spills == 0


@pytest.mark.parametrize("capability", SHARED_MEMORY)
@pytest.mark.parametrize("name", FORWARD)
def test_the_forward_kernel_fits_and_spills_nothing(name: str, capability: int) -> None:
    compiled = compile_for(forward(*FORWARD[name](), capability=capability), capability)
    fits(compiled, capability)
    if capability == 90 and "fp32" not in name:
        assert "wgmma.mma_async" in compiled.ptx
    if capability == 100 and "fp32" not in name:
        assert "tcgen05.mma" in compiled.ptx


@pytest.mark.parametrize(
    ("dim", "block", "capability"), ((72, 128, 80), (128, 128, 80), (128, 128, 90), (128, 64, 90), (128, 256, 90))
)
def test_the_pass_for_statistics_fits_with_next_to_no_spills(dim: int, block: int, capability: int) -> None:
    p = problem(torch.bfloat16, dim, layout=BlockLayout.dense(SEQ, SEQ, 128, block))
    pooled = pooled_compensation(p.k, p.v, 32)
    stats = torch.empty(1, HEADS, p.layout.nq * 128 // stats_config(p).rows, p.layout.nk)
    launch = plan_block_stats(p, "error", pooled, p.q, torch.empty(1, HEADS, SEQ), stats)
    compiled = compile_for(launch, capability)
    assert compiled.shared <= SHARED_MEMORY[capability]
    assert compiled.spills <= (8 if block > 128 else 0)
    if capability == 90 and block % 128 == 0:
        assert "wgmma.mma_async" in compiled.ptx


@pytest.mark.parametrize("name", ("bf16 64", "bf16 72", "bf16 96", "bf16 128", "full blocks only"))
def test_hopper_keeps_its_prefetch_of_keys_and_values(name: str) -> None:
    compiled = compile_for(forward(*FORWARD[name]()), 90)
    assert compiled.waits and max(compiled.waits) >= 2  # a wait that leaves copies in flight: the loop is not drained


@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_all_terms_at_once_still_fit(capability: int) -> None:
    compiled = compile_for(everything(128, capability), capability)
    assert compiled.shared <= SHARED_MEMORY[capability]
    assert compiled.spills <= 32  # outside of the loops; docs/kernels.md says so


@pytest.mark.parametrize(("capability", "dim", "most"), ((80, 64, 300), (80, 128, 545), (90, 64, 200), (90, 128, 215)))
def test_the_sparse_loop_has_few_more_instructions_than_a_dense_one(capability: int, dim: int, most: int) -> None:
    p = plain_problem(dim)
    config = forward_config(p, NO_TERMS, capability)
    lazy = lazy_rescaling(p, NO_TERMS, capability)
    launches = sparse_launch(dim, config, capability), plan_dense(dim, config, lazy)
    sparse, dense = (inner_loop(compile_for(one, capability).disassemble()) for one in launches)
    assert sparse.instructions <= 1.1 * dense.instructions
    assert sparse.instructions * 64 <= most * config.columns
    assert sparse.barriers <= max(dense.barriers, 4)
    assert lazy == (sparse.rescaled < dim // 4)  # nothing in the loop rescales the accumulator


@pytest.mark.parametrize(("capability", "dim", "most"), ((80, 64, 385), (90, 64, 335), (90, 128, 385)))
def test_64_pooled_keys_take_few_instructions_and_the_keys_no_more(capability: int, dim: int, most: int) -> None:
    p = problem(torch.bfloat16, dim, 1024)
    pooling = Terms(compensation=pooled_compensation(p.k, p.v, 128))
    keys, pooled = key_loops(compile_for(forward(p, pooling, capability=capability), capability).disassemble())[:2]
    alone = inner_loop(compile_for(forward(p, capability=capability), capability).disassemble())
    assert keys.instructions <= 1.02 * alone.instructions and pooled.instructions <= most
    assert max(keys.rescaled, pooled.rescaled) < dim // 4


def test_descriptors_become_bulk_copies_on_hopper() -> None:
    compiled = compile_for(forward(problem(torch.bfloat16, 128), tma=True), 90)
    fits(compiled, 90)
    assert "cp.async.bulk.tensor" in compiled.ptx


@pytest.mark.parametrize("capability", SHARED_MEMORY)
@pytest.mark.parametrize(("dtype", "dim"), ((torch.bfloat16, 64), (torch.bfloat16, 72), (torch.float16, 128)))
def test_the_backward_kernels_fit_and_spill_nothing(dtype: torch.dtype, dim: int, capability: int) -> None:
    for launch in backward(problem(dtype, dim), capability):
        fits(compile_for(launch, capability), capability)


def test_consumer_blackwell_gets_tiles_that_fit_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (12, 0))
    assert _capability(torch.device("cuda")) == 89
    p = problem(torch.bfloat16, 128)
    forward = plan_forward(p, NO_TERMS, torch.empty_like(p.q), torch.empty(1, HEADS, p.q.shape[1]), capability=89)
    for launch in (forward, *backward(p, 89)[1:]):
        assert compile_for(launch, 120).shared <= SHARED_MEMORY[89]


@pytest.mark.parametrize(("capability", "dim"), ((80, 64), (90, 128)))
def test_the_loops_of_the_gradients_have_no_more_instructions_than_recorded(capability: int, dim: int) -> None:
    recorded = json.loads(OUTPUT.read_text())["rows"]
    configs = backward_configs(plain_problem(dim), capability)
    for what, config, launch in zip(("q", "k and v"), configs, gradient_launches(dim, capability)):
        ours, dense = (
            next(
                row["warp_instructions_64_x_64"]
                for row in recorded
                if (row["kernel"], row["capability"], row["head_dim"])
                == (f"{name}, gradient of {what}", capability, dim)
            )
            for name in ("sparse", "dense")
        )
        loop = key_loops(compile_for(launch, capability).disassemble())[0]
        issued = loop.instructions * config.warps * 4096 / (config.rows * config.columns)
        assert issued <= 1.02 * ours and issued <= 1.1 * dense and loop.spills == 0


MASKED: dict[str, Callable[[], BlockLayout]] = {
    "window": lambda: inward_window((4, 16, 16), (3, 9, 9), text_after=8),
    "bits": lambda: from_rule(lambda q, k: (q + k) % 3 != 0, SEQ, SEQ),
    "segments": lambda: from_segments(torch.arange(SEQ)[None] // 300),
    "keys": lambda: BlockLayout.dense(SEQ, SEQ),
}


@pytest.mark.parametrize("capability", (80, 90))
@pytest.mark.parametrize("name", MASKED)
def test_gradients_through_masks_fit_and_spill_nothing(name: str, capability: int) -> None:
    p = problem(torch.bfloat16, 128, layout=MASKED[name]())
    keys = torch.ones(1, SEQ, dtype=torch.bool), torch.zeros(1, HEADS, SEQ)
    for launch in backward(replace(p, key_mask=keys[0], key_bias=keys[1]), capability):
        fits(compile_for(launch, capability), capability)
