"""The backend that runs torch's CPU flash attention on gathered key blocks, against the formulas in fp64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dit_attn.errors import DitAttnError
from dit_attn.kernels import (
    BlockLayout,
    choose_backend,
    inward_window,
    pooled_compensation,
    reference_attention,
    sparse_attention,
)
from dit_attn.kernels.cost import Cost, CostTable, lookup
from dit_attn.kernels.cost.store import VARIABLE, save_table
from dit_attn.kernels.functional import contending_backends
from dit_attn.kernels.terms import Terms
from tests._support.kernel_cases import TERMS, assert_formulas, assert_gradients_of_gather, call

FLASH = "gather-sdpa"
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.float64: 1e-10}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("altered", (False, True))
def test_it_agrees_with_the_formulas(dtype: torch.dtype, altered: bool) -> None:
    assert_formulas(FLASH, dtype, 16, altered, TOLERANCE[dtype], min(1e-4, TOLERANCE[dtype]))


def test_gradients_are_those_of_gather() -> None:
    assert_gradients_of_gather(FLASH)


def test_what_it_cannot_run_is_refused_with_the_reason() -> None:
    x = torch.randn(1, 64, 2, 8)
    with pytest.raises(DitAttnError, match="element masks"):
        sparse_attention(x, x, x, inward_window((8, 8), (3, 3), q_block=16, kv_block=16), backend="gather-sdpa")
    with pytest.raises(DitAttnError, match="head size"):
        sparse_attention(x, x, x[..., :4], BlockLayout.dense(64, 64, 16, 16), backend="gather-sdpa")
    with pytest.raises(DitAttnError, match="low-rank bias"):
        p = call()
        sparse_attention(p.q, p.k, p.v, p.layout, bias=TERMS["bias"](p).bias, backend=FLASH)


def test_its_log_sum_exp_is_good_enough_for_gradients_and_for_pooled_keys() -> None:
    """Logits are fp32 and the exponential has 20 bits, where a bf16 logit has 8."""
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 256, 2, 64, generator=rng).bfloat16() for _ in range(3))
    scores = torch.randn(1, 2, 8, 8, generator=rng)
    layout = BlockLayout.from_topk(scores, 4, q_len=256, kv_len=256, q_block=32, kv_block=32)
    for size in (1.0, 8.0):
        _, lse = sparse_attention(q * size, k, v, layout, return_lse=True, backend=FLASH)
        exact = reference_attention((q * size).double(), k.double(), v.double(), layout)[1]
        assert float((lse.double() - exact).abs().max()) < 1e-4


# -- when it is chosen -------------------------------------------------------------------------------------------------


def have_amx(monkeypatch: pytest.MonkeyPatch, *types: str) -> None:
    """Let the processor have AMX for some of ``tile`` (bf16) and ``fp16``."""
    for name in ("tile", "fp16"):
        monkeypatch.setattr(torch.cpu, f"_is_amx_{name}_supported", lambda found=name in types: found, raising=False)
    monkeypatch.setattr(torch.cpu, "_init_amx", lambda: True, raising=False)


def bf16_call(tokens: int = 512, kept: int = 4) -> tuple[torch.Tensor, BlockLayout]:
    rng = torch.Generator().manual_seed(0)
    blocks = tokens // 32
    scores = torch.randn(1, 2, blocks, blocks, generator=rng)
    layout = BlockLayout.from_topk(scores, kept, q_len=tokens, kv_len=tokens, q_block=32, kv_block=32)
    return torch.randn(1, tokens, 2, 64, generator=rng).bfloat16(), layout


def test_amx_makes_it_the_choice_for_what_it_can_run_and_the_choice_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    q, layout = bf16_call()
    have_amx(monkeypatch, "tile")
    comp = pooled_compensation(q, q, 16)
    for asked in ({}, {"return_lse": True}, {"terms": Terms(compensation=comp)}):
        choice = choose_backend(q, layout, **asked)  # type: ignore[arg-type]
        assert choice.backend == FLASH and f"{FLASH}: used, this CPU has AMX for this type" in str(choice)
    out, named = (sparse_attention(q, q, q, layout, compensation=comp, backend=name) for name in (None, FLASH))
    assert torch.equal(out, named)  # type: ignore[arg-type]
    assert choose_backend(q.requires_grad_(), layout).backend == FLASH
    q = q.detach()
    window = inward_window((16, 32), (5, 5), q_block=32, kv_block=32)
    p = call(torch.bfloat16)
    for other, reason in (
        (choose_backend(q, window, return_lse=True), "it supports no element masks"),
        (choose_backend(p.q, p.layout, terms=TERMS["bias"](p)), "it adds no low-rank bias to the logits"),
        (choose_backend(q.half(), layout), "this CPU has no AMX for float16; only on request"),
        (choose_backend(q.float(), layout), "AMX is for bf16 and fp16; only on request"),
    ):
        assert other.backend == "gather" and other.reasons[FLASH] == reason
    have_amx(monkeypatch, "tile", "fp16")
    assert choose_backend(q.half(), layout).backend == FLASH
    assert contending_backends(q, layout) == (FLASH, "gather-bf16", "gather")
    assert contending_backends(q.half(), layout) == (FLASH, "gather")
    assert contending_backends(q.float(), layout) == ("gather",)
    have_amx(monkeypatch)
    assert contending_backends(q.half(), layout) == ("gather", FLASH)
    without = choose_backend(q, layout)
    assert without.backend != FLASH and without.reasons[FLASH] == "this CPU has no AMX for bfloat16; only on request"
    assert ": used\n" in str(without)


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[CostTable]:
    """A saved table of this machine: the backend is slowest at 512 tokens, fastest at 4096 and at low density."""
    caches = (lookup._comparison, lookup._table_of_process)
    monkeypatch.setenv(VARIABLE, str(tmp_path / "costs.json"))
    costs = (
        Cost(64, "bfloat16", 512, 0.25, 0.5, FLASH),  # of a version that compared nothing
        Cost(64, "bfloat16", 512, 0.25, 0.5, "gather-bf16", ("gather", FLASH)),
        Cost(64, "bfloat16", 512, 0.06, 0.5, FLASH, ("gather-bf16", "gather")),
        Cost(64, "bfloat16", 4096, 0.25, 0.5, FLASH, ("gather-bf16", "gather")),
    )
    table = CostTable(lookup.this_machine("cpu"), costs)
    save_table(table)
    for cache in caches:
        cache.cache_clear()
    yield table
    for cache in caches:
        cache.cache_clear()


def test_a_compiled_call_is_one_graph_that_goes_by_the_processor(
    saved: CostTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    have_amx(monkeypatch, "tile")
    q, layout = bf16_call()
    comp = pooled_compensation(q, q, 16)

    def attend(q: torch.Tensor, backend: str | None = None) -> Any:
        return sparse_attention(q, q, q, layout, compensation=comp, return_lse=True, backend=backend)

    compiled = torch.compile(attend, backend="eager", fullgraph=True)(q)
    assert all(torch.equal(a, b) for a, b in zip(compiled, attend(q, FLASH)))
    assert not torch.equal(compiled[0], attend(q)[0])  # whose measurement says otherwise


@pytest.mark.parametrize("amx", (False, True))
def test_a_saved_comparison_near_the_call_decides_over_the_processor(
    saved: CostTable, monkeypatch: pytest.MonkeyPatch, amx: bool
) -> None:
    have_amx(monkeypatch, *("tile",) * amx)
    q, layout = bf16_call()
    slow = choose_backend(q, layout)
    rival = "gather-bf16" if amx else slow.backend  # what the processor multiplies
    assert slow.backend == rival != FLASH and choose_backend(*bf16_call(640, 8)).backend == rival
    at = "on this machine, measured at 512 tokens, heads of 64, density"
    assert slow.reasons[FLASH] == f"not clearly faster than {rival} {at} 0.25"
    fast = choose_backend(*bf16_call(kept=1))
    assert fast.backend == FLASH and fast.why == f"about as fast as {rival} or faster {at} 0.06"
    assert "4,096 tokens" in choose_backend(*bf16_call(4096, 32)).why
    assert choose_backend(q, layout, return_lse=True).backend == "gather"  # the measured order of these two
    assert choose_backend(q.half(), layout).backend == "gather"  # not measured


def test_a_run_keeps_the_choice_it_began_with(saved: CostTable, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table saved by another process, and gradients, which nobody measured."""
    have_amx(monkeypatch, "tile")
    q, layout = bf16_call()
    assert choose_backend(q, layout).backend != FLASH
    save_table(replace(saved, costs=tuple(replace(c, backend=FLASH, slower=("gather-bf16",)) for c in saved.costs)))
    assert choose_backend(q, layout).backend != FLASH
    assert choose_backend(q.requires_grad_(), layout).backend == FLASH
    lookup._comparison.cache_clear()
    lookup._table_of_process.cache_clear()
    assert choose_backend(q.detach(), layout).backend == FLASH


def test_attention_needs_no_file_of_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookup, "saved_table", lambda machine: (_ for _ in ()).throw(RuntimeError("no home folder")))
    lookup._table_of_process.cache_clear()
    assert lookup._table_of_process("cpu", 1) is None
    lookup._table_of_process.cache_clear()
