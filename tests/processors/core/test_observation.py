"""Log-sum-exp and attention to spans of keys, of the attention that was computed, against its formula in float64."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

import dit_attn
from dit_attn.errors import DitAttnError
from dit_attn.kernels import Epilogue, pooled_compensation
from dit_attn.processors.core import executor
from dit_attn.processors.core.call import AttentionCall, Request
from dit_attn.processors.core.dispatch import dispatch_attention
from dit_attn.processors.core.observation import Observation, Probe
from tests._support.core_calls import Dispatched, host_run, random_args
from tests._support.recorded_calls import weights
from tests.processors.core.test_logit_bias import MASKS, SEQ, VISUAL, attention_call, run, with_layout
from tests.processors.core.test_sequence_parallel import Mesh, Ranks, sharded

CHOSEN = torch.rand(2, SEQ, generator=torch.Generator().manual_seed(7)) < 0.3
SPANS = (slice(0, 9), slice(30, 60), CHOSEN, slice(5, 5))
ROWS = (slice(None), slice(20, 40), CHOSEN, slice(3, 3))


def observed(call: AttentionCall, request: Request, spans: Any = SPANS, rows: Any = ROWS) -> Observation:
    return executor.observe(call, request, Probe(lambda _: None, spans, rows))


def check(found: Observation, matrix: torch.Tensor, lse: torch.Tensor, atol: float = 2e-6) -> None:
    """Compare with the attention matrix (B, H, S, Sk) and its log-sum-exp."""
    pick = [torch.zeros(2, matrix.shape[-1]).double() for _ in SPANS]
    for mask, span in zip(pick, SPANS, strict=True):
        if isinstance(span, slice):
            mask[:, span] = 1.0
        else:
            mask += span
    row_mass = torch.einsum("bhqk,bkn->bhqn", matrix, torch.stack(pick, -1))
    torch.testing.assert_close(found.lse.double(), lse, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.row_mass.double(), row_mass, atol=atol, rtol=1e-4)
    means = [row_mass.mean(2), row_mass[:, :, 20:40].mean(2)]
    means.append(torch.stack([row_mass[b, :, CHOSEN[b]].mean(1) for b in range(2)]))
    means.append(torch.zeros_like(means[0]))
    torch.testing.assert_close(found.mass.double(), torch.stack(means, 2), atol=atol, rtol=1e-4)


@pytest.mark.parametrize("mask", sorted(MASKS))
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("order", ["dense", "raster", "hilbert"])
def test_statistics_of_rows_and_regions_are_the_formula(mask: str, biased: bool, order: str) -> None:
    call = attention_call(mask=MASKS[mask]())
    request = Request() if order == "dense" else with_layout(call, None if order == "raster" else order)
    total = torch.zeros(2, 4, SEQ, SEQ, dtype=torch.float64)
    if biased:
        for rows, keys, value in ((slice(4, 90), slice(0, 9), 1.3), (slice(25, 70), slice(30, 50), -math.inf)):
            request.add_span_bias(call, rows, keys, value)
            total[:, :, rows, keys] += value
        for barred in (slice(60, 62), slice(1, 2), slice(SEQ - 1, SEQ)):
            request.add_span_bias(call, barred, slice(None), -math.inf)
            total[:, :, barred] = -math.inf
    before = run(call, request)
    found = observed(call, request)
    if request.permuted is not None and request.layout is not None:
        at = request.permuted.order
        assert at.rows is not None and at.keys is not None
        allowed = torch.zeros(2, 4, VISUAL, SEQ, dtype=torch.bool)
        allowed[:, :, at.rows[:, None], at.keys[None]] = request.layout.materialize().expand(2, 4, -1, -1)
        total[:, :, call.visual] = total[:, :, call.visual].masked_fill(~allowed, -math.inf)
        check(found, *weights(call, Request(), total))
    else:
        check(found, *weights(call, request, total))
    assert torch.equal(before, run(call, request)) and found.lse.dtype == found.mass.dtype == torch.float32


def test_pooled_keys_count_for_the_spans_of_their_keys() -> None:
    call = attention_call(key_heads=4)
    request = with_layout(call)
    request.compensation = pooled_compensation(call.k, call.v, 8)
    indicator = torch.zeros(2, SEQ, 1, 1)
    indicator[:, 30:60] = 1.0
    call.v = indicator.expand(-1, -1, 4, 16).contiguous()  # the output of these values is the attention to the span
    request.compensation = pooled_compensation(call.k, call.v, 8)
    out = run(call, request)[:, call.visual, :, 0].transpose(1, 2)
    mass = observed(call, request).row_mass[:, :, call.visual, 1]
    torch.testing.assert_close(mass, out, atol=1e-6, rtol=1e-5)
    whole = observed(call, request, (slice(None),)).row_mass
    torch.testing.assert_close(whole, torch.ones_like(whole))


def test_what_is_done_to_the_written_rows_is_no_part_of_their_attention() -> None:
    call = attention_call()
    plain, scaled = with_layout(call), with_layout(call)
    blocks = (VISUAL + 15) // 16
    shift = torch.ones(1, 1, blocks, call.v.shape[-1])
    scaled.epilogue = Epilogue(row_scale=torch.full((1, 1, blocks), 3.0), add=shift)
    assert not torch.equal(run(call, plain), run(call, scaled))
    found, same = observed(call, scaled), observed(call, plain)
    assert torch.equal(found.row_mass, same.row_mass) and torch.equal(found.lse, same.lse)


def test_more_spans_than_channels_take_more_passes_and_none_leave_the_log_sum_exp() -> None:
    call = attention_call()
    spans = tuple(slice(i, i + 5) for i in range(0, 100, 5))
    found = observed(call, Request(), spans)
    matrix, lse = weights(call, Request())
    truth = matrix[..., :100].unflatten(-1, (20, 5)).sum(-1)
    torch.testing.assert_close(found.row_mass.double(), truth, atol=2e-6, rtol=0)
    alone = observed(call, Request(), ())
    assert alone.row_mass.shape == (2, 4, SEQ, 0) and alone.mass.shape == (2, 4, 4, 0)
    torch.testing.assert_close(alone.lse.double(), lse, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 8e-3), (torch.float16, 1e-3), (torch.float64, 1e-12)])
def test_other_types(dtype: torch.dtype, tolerance: float) -> None:
    call = attention_call(dtype=dtype)
    found = observed(call, Request())
    assert found.lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    check(found, *weights(call, Request()), atol=tolerance)


def test_what_is_observed_of_a_dispatched_call_has_its_scale_and_changes_nothing() -> None:
    class Asks:
        role, min_tokens, sites = "", 0, ("self",)

        def request(self, call: AttentionCall, request: Request) -> None:
            request.multiply_scale(2.0)
            request.observe(seen.append, spans=(slice(0, 20),))

    seen: list[Observation] = []
    sparse = dit_attn.BlockSparse(density=0.4, q_block=32, kv_block=32, dense_steps=0)
    for methods in ([Asks()], [sparse, Asks()]):
        done = Dispatched(*host_run(methods), random_args(scale=0.2))
        matrix, lse = weights(done.call, done.request)
        assert done.call is not None and done.call.scale == 0.4
        found = seen.pop()
        torch.testing.assert_close(found.lse.double(), lse, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found.row_mass[..., 0].double(), matrix[..., :20].sum(-1), atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("replaced", [False, True])
def test_an_observed_call_is_a_stock_call_and_a_replaced_one_is_not_observed(replaced: bool) -> None:
    class Asks:
        role, min_tokens, sites = "", 0, ("self",)

        def request(self, call: AttentionCall, request: Request) -> None:
            request.observe(seen.append)
            if replaced:
                request.replace_output(torch.zeros_like(call.q))

    seen: list[Observation] = []
    state, layer = host_run([Asks()])
    done = Dispatched(state, layer, random_args())
    assert (len(seen), done.stock_calls) == ((0, 0) if replaced else (1, 1))
    assert layer.stats.fallbacks == ({} if replaced else {"only observed": 1})


def test_two_ranks_observe_the_heads_they_have() -> None:
    class Asks:
        role, min_tokens, sites = "", 0, ("self",)

        def __init__(self, seen: list[Observation]) -> None:
            self.seen = seen

        def request(self, call: AttentionCall, request: Request) -> None:
            request.observe(self.seen.append, spans=(slice(0, 20),))

    full, alone = random_args(), []
    Dispatched(*host_run([Asks(alone)]), full)

    def work(mesh: Mesh) -> Observation:
        seen: list[Observation] = []
        q, k, v = (sharded(x, [20, 288], 2, mesh.rank) for x in (full.q, full.k, full.v))
        dispatch_attention(*host_run([Asks(seen)]), replace(full, q=q, k=k, v=v, mesh=mesh), lambda args: args.q)
        return seen[0]

    for rank, found in enumerate(Ranks(2).run(work)):
        mine = slice(2 * rank, 2 * rank + 2)
        torch.testing.assert_close(found.lse, alone[0].lse[:, mine])
        torch.testing.assert_close(found.mass, alone[0].mass[:, mine])


def test_spans_that_do_not_fit_are_refused_in_one_line() -> None:
    with pytest.raises(DitAttnError, match="tokens must be a slice, or bool"):
        observed(attention_call(), Request(), (torch.ones(5, dtype=torch.bool),))
